"""Adding to a memory system: what is refused, what is reported as nearly there already, and for how many looks."""

import random
import warnings
from itertools import pairwise

import pytest

from ai_sleep_constructs.memory.likeness import alike_before, likeness_of, shingles
from ai_sleep_constructs.memory.store import MemoryStore
from ai_sleep_constructs.memory.system import MemorySystem, NearDuplicateWarning

WALL = "The harbour wall was built in 1890 by the town."


def system(**options) -> MemorySystem:
    return MemorySystem(None, ":memory:", embedder=None, **options)


@pytest.mark.parametrize("items", ["hello", {"text": "hello"}, None, 3, b"hello"])
@pytest.mark.parametrize("near_duplicate", [0.9, None])
def test_what_is_no_list_of_items_is_refused(items, near_duplicate):
    with system(near_duplicate=near_duplicate) as memory:
        with pytest.raises(TypeError, match="^items: "):
            memory.add_memories(items)
        assert len(memory) == 0


@pytest.mark.parametrize("item", [3, None, "", "a\ud800b", (), ("a", None, 1), {}, {"text": 3}, [], {"text": "a", "id": 7}])
def test_a_wrong_item_is_named_and_nothing_is_kept(item):
    with system() as memory:
        with pytest.raises((ValueError, TypeError), match=r"items\[2\]"):
            memory.add_memories([WALL, WALL, item])
        assert len(memory) == 0


def test_any_iterable_of_items_is_kept():
    with system() as memory:
        assert len(memory.add_memories(f"number {n}" for n in range(3))) == 3 and memory.add_memories([]) == [] and len(memory) == 3


def test_copies_in_one_batch_are_reported():
    with system() as memory:
        with pytest.warns(NearDuplicateWarning, match="and 19 more") as caught:
            ids = memory.add_memories([WALL] * 25)
        assert f"{ids[1]} is 100% like {ids[0]}" in str(caught[0].message) and len(caught) == 1 and caught[0].filename == __file__
        with pytest.warns(NearDuplicateWarning, match="100% like"):
            memory.add_memories([("Yes!", {"n": 1}), {"text": "yes"}])
        with pytest.warns(NearDuplicateWarning, match="100% like"):
            memory.add_memories(["...", "...  "])


def test_many_copies_of_an_old_text_are_reported():
    with system() as memory:
        first = memory.add_memory(WALL)
        with pytest.warns(NearDuplicateWarning, match=f"100% like {first}; .* and 20 more"):
            memory.add_memories([WALL.upper()] * 25)


@pytest.mark.parametrize("batch", [False, True])
def test_where_warnings_are_errors_nothing_is_kept(batch):
    with system() as memory:
        first = memory.add_memory(WALL)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(NearDuplicateWarning, match=first):
                memory.add_memories(["Cats sleep.", WALL]) if batch else memory.add_memory(WALL)
            with pytest.raises(NearDuplicateWarning):
                memory.add_memories(["Dogs bark at cats."] * 2)
            assert len(memory) == 1 and memory.add_memory("Cats sleep most of the day.") and len(memory) == 2
            assert memory.store.integrity_check() == []


def test_near_duplicates_are_not_looked_for_when_none_are_wanted():
    with system(near_duplicate=None) as memory, warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.add_memory(WALL), memory.add_memories([WALL] * 3)
        assert len(memory) == 4


def edited(text: str, rng: random.Random) -> str:
    words = text.split()
    for _ in range(rng.choice([1, 1, 2])):
        place, change = rng.randrange(len(words)), rng.randrange(3)
        words[place : place + (change != 0)] = [[], ["other"], []][change] if change else ["now"]
    return " ".join(words).capitalize()


def lines(kind: str, count: int, rng: random.Random) -> list[str]:
    if kind == "pattern":
        return [
            f"10:{n // 60 % 60:02d}:{n % 60:02d} worker {n % 7} handled request {rng.randrange(9**5)} of user {rng.randrange(1000)} in {rng.randrange(500)} ms with status 200"
            for n in range(count)
        ]
    size = {"many words": 9000, "few words": 200}[kind]
    vocabulary = [f"{'abcdefghij'[n % 10]}{n}" for n in range(size)]
    weights = [1 / (n + 1) for n in range(size)]
    return [" ".join(rng.choices(vocabulary, weights, k=rng.randrange(6, 41))) for _ in range(count)]


@pytest.mark.parametrize("kind", ["many words", "few words", "pattern"])
def test_what_is_nearly_there_is_found_and_few_texts_are_read_for_it(kind):
    rng = random.Random(3)
    texts = lines(kind, 3000, rng)
    with MemoryStore(":memory:") as store:
        ids = store.add_many(texts)
        pairs: list[tuple[str, str]] = []
        while len(pairs) < 60:
            place = rng.randrange(len(texts))
            other = edited(texts[place], rng)
            if likeness_of(shingles(other), shingles(texts[place])) >= 0.9:
                pairs.append((ids[place], other))
        read: list[str] = []
        store.connections.get().create_function("length", 1, lambda text: read.append(text) or len(text))
        found = [{id for id, _ in near} for near in store.near_duplicates_of([other for _, other in pairs])]
        assert sum(id in near for (id, _), near in zip(pairs, found, strict=True)) >= 57
        assert len(read) <= 60 * 100


def test_common_words_of_many_are_no_hindrance_to_short_texts():
    with MemoryStore(":memory:") as store:
        store.add_many([f"the red house and the green garden and the {word} {n}" for n in range(300) for word in ("red", "green")])
        first, second = store.add("The red house."), store.within("other").add("The red house.")
        assert store.near_duplicates("the red house") == [(first, 1.0)] and store.within("other").near_duplicates("the red house") == [(second, 1.0)]
        assert store.near_duplicates("the green house") == [] and store.near_duplicates("a blue garden") == []
        store.clear()
        assert store.near_duplicates("the red house") == []  # what is remembered of common words says nothing of what is there


def test_earlier_ones_in_a_batch():
    rng = random.Random(5)
    texts = lines("few words", 150, rng)
    texts += [edited(text, rng) for text in texts]
    found = alike_before(texts, 0.8)
    every = [shingles(text) for text in texts]
    assert {late: early for late, (early, _) in found.items()}.keys() == {
        late for late in range(300) if any(likeness_of(every[early], every[late]) >= 0.8 for early in range(late))
    }
    assert all(value == likeness_of(every[early], every[late]) for late, (early, value) in found.items())
    assert all(early < late for late, (early, _) in found.items()) and all(a != b for a, b in pairwise(texts))
