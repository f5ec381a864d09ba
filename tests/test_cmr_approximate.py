"""Approximate search against the exact one: the same where every list is looked at, whatever the buffer did since it was built."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_sleep_constructs.cmr.approximate import ApproximateIndex
from ai_sleep_constructs.cmr.buffer import LayeredMemoryBuffer

SIZE, LISTS = 8, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def store(buffer, number, seed, sequence=0):
    scores = torch.rand(number, generator=torch.Generator().manual_seed(seed))
    return buffer.store_states(draw(number, SIZE, seed=seed), 0, torch.arange(number), scores, sequence)


def filled(number=200, capacity=200, dtype=torch.float32):
    buffer = LayeredMemoryBuffer(capacity, capacity, "lru", dtype=dtype)
    for sequence in range(4):
        store(buffer, number // 4, sequence, sequence)
    return buffer


def whole(buffer, **options):
    "An index that looks at every list."
    return ApproximateIndex(buffer, 0, **{"from_entries": 20, "lists": LISTS, "probes": LISTS, **options})


def same(buffer, index, k=7, queries=None, **wanted):
    "Both searches find the same similarities, at rows that have them and that qualify."
    queries = draw(5, SIZE, seed=99) if queries is None else queries
    scores, slots = index.search(queries, k, touch=False, **wanted)
    exact, _ = buffer.search(queries, 0, k, touch=False, **wanted)
    close = {"rtol": 0, "atol": {torch.bfloat16: 0.02, torch.float16: 2e-3}.get(buffer.dtype, 2e-5)}  # as the exact product rounds
    assert (scores.shape, scores.dtype, slots.dtype) == (exact.shape, torch.float32, torch.int64)
    torch.testing.assert_close(scores, exact, **close)
    there, rows = scores > -torch.inf, buffer.layers[0]
    assert bool(rows.valid[slots[there]].all())
    true = torch.cosine_similarity(buffer.gather(0, slots).states.float(), queries[:, None].float(), dim=-1)
    torch.testing.assert_close(scores[there], true[there], **close)
    for row in range(len(slots)):
        assert len(slots[row][there[row]].unique()) == int(there[row].sum())
    return slots[there]


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss", reason="faiss-cpu is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("k", [1, 7, 150, 500])
def test_all_lists_looked_at_is_the_exact_search(faiss, dtype, k):
    buffer = filled(dtype=dtype)
    index = whole(buffer)
    same(buffer, index, k)
    assert index.builds == 1 and len(index) == 200 and index.nbytes > 200 * SIZE * 4


@pytest.mark.parametrize("wanted", [{"min_relevance": 0.7}, {"sequence": 2}, {"exclude_sequence": 0}, {"sequence": 9}, {"min_relevance": 0.9, "sequence": 1}])
@pytest.mark.parametrize("probes", [1, LISTS])
def test_what_does_not_qualify_is_left_out(faiss, wanted, probes):
    buffer = filled()
    index = whole(buffer, probes=probes)
    if probes == LISTS:
        found = same(buffer, index, 60, **wanted)
    scores, slots = index.search(draw(5, SIZE, seed=99), 60, touch=False, **wanted)
    exact, _ = buffer.search(draw(5, SIZE, seed=99), 0, 60, touch=False, **wanted)
    assert torch.equal(scores > -torch.inf, exact > -torch.inf)  # as many as there are, even where the lists hold fewer
    found, rows = slots[scores > -torch.inf], buffer.layers[0]
    assert bool((rows["relevance"][found] >= wanted.get("min_relevance", 0)).all())
    assert bool((rows["sequence"][found] == wanted["sequence"]).all()) if "sequence" in wanted else True
    assert not bool((rows["sequence"][found] == wanted.get("exclude_sequence", -1)).any())


def test_fewer_probes_look_at_fewer_memories_and_find_the_near_ones(faiss):
    buffer = filled(400, 400)
    queries = buffer.layers[0]["states"][:64].clone()
    few, every = whole(buffer, lists=16, probes=1), whole(buffer, lists=16, probes=16)
    one, all_ = few.search(queries, 10, touch=False), every.search(queries, 10, touch=False)
    assert torch.equal(one[1][:, 0], torch.arange(64)) and torch.equal(all_[1][:, 0], torch.arange(64))
    assert bool((one[0] <= all_[0] + 1e-5).all()) and float(one[0].sum()) < float(all_[0].sum()) - 1  # it is approximate


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.integers(1, 60)), st.tuples(st.just("forget"), st.integers(0, 4)),
        st.tuples(st.just("clean"), st.floats(0.1, 1)), st.tuples(st.just("search"), st.integers(1, 30)),
        st.tuples(st.sampled_from(["snapshot", "restore", "optimize", "clear"]), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None)
@given(OPERATIONS)
def test_stays_right_whatever_the_buffer_does(operations):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    buffer = filled(100, 120)
    index = whole(buffer)
    saved = buffer.snapshot()
    for number, (what, value) in enumerate(operations):
        if what == "store":
            store(buffer, value, 1000 + number, number % 5)
        elif what == "forget":
            buffer.clear_sequence(value)
        elif what == "clean":
            buffer.cleanup_least_relevant(value)
        elif what == "snapshot":
            saved = buffer.snapshot()
        elif what == "restore":
            buffer.restore(saved)
        elif what == "optimize":
            buffer.optimize()
        elif what == "clear":
            buffer.clear_all()
        if 0 in buffer.layers:
            same(buffer, index, value if what == "search" else 7)
            same(buffer, index, sequence=number % 5)


def test_few_changes_are_added_and_many_build_it_again(faiss):
    buffer = filled()
    index = whole(buffer)
    same(buffer, index)
    new = store(buffer, 30, 50)  # over the 30 oldest
    assert set(same(buffer, index, 1, draw(30, SIZE, seed=50)).tolist()) == set(new.tolist())
    assert index.builds == 1 and len(index) == 230
    store(buffer, 20, 51)
    same(buffer, index)
    assert index.builds == 2 and len(index) == 200
    buffer.clear_sequence(3)
    same(buffer, index)
    assert index.builds == 3 and len(index) == buffer.count(0)


def test_rows_that_were_replaced_are_noticed(faiss):
    "After `restore` the same insertion number at the same row may be another memory."
    buffer = filled(180)
    index, saved, kept = whole(buffer), buffer.snapshot(), []
    for seed in (60, 61):
        kept.append(buffer.layers[0])  # the rows that are replaced may live on elsewhere
        buffer.restore(saved)
        new = store(buffer, 10, seed)
        assert torch.equal(same(buffer, index, 1, draw(10, SIZE, seed=seed)), new)
    assert index.builds == 2


def test_below_the_limit_nothing_is_held(faiss):
    buffer = filled()
    index = whole(buffer, from_entries=150)
    same(buffer, index)
    assert index.builds == 1 and index.nbytes > 0
    buffer.cleanup_least_relevant(0.5)
    same(buffer, index)
    assert len(index) == 0 and index.nbytes == 0
    empty = ApproximateIndex(LayeredMemoryBuffer(), 3)
    assert [tuple(found.shape) for found in empty.search(draw(2, SIZE), 4)] == [(2, 0), (2, 0)]


def test_being_found_counts_as_being_used_unless_told(faiss):
    buffer = filled()
    index = whole(buffer)
    _, slots = index.search(draw(3, SIZE, seed=9), 5)
    assert int(buffer.layers[0]["accesses"].sum()) == 15 and bool((buffer.layers[0]["accesses"][slots.unique()] > 0).all())
    index.search(draw(3, SIZE, seed=9), 5, touch=False)
    assert int(buffer.layers[0]["accesses"].sum()) == 15


def test_same_seed_same_lists_and_inference_mode(faiss):
    buffer = filled(400, 400)
    one, two = (whole(buffer, lists=16, probes=2, seed=3) for _ in range(2))
    queries = draw(20, SIZE, seed=7)
    with torch.inference_mode():
        first = one.search(queries, 5, touch=False)
    second = two.search(queries, 5, touch=False)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    store(buffer, 5, 70)
    assert torch.equal(one.search(queries, 5, touch=False)[0], two.search(queries, 5, touch=False)[0])
    assert one.search(queries[:0], 5)[0].shape == (0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "0"}, "layer must be an int"), ({"from_entries": 0}, "from_entries must be an int of 1 or more, got 0"),
        ({"lists": 0}, "lists must be an int from 1 to 20 or None, got 0"), ({"lists": 21}, "lists must be an int from 1 to 20"),
        ({"probes": 0}, "probes must be an int from 1 to 4, got 0"), ({"probes": 5}, "probes must be an int from 1 to 4, got 5"),
        ({"probes": 0, "lists": None}, "probes must be an int of 1 or more"), ({"seed": -1}, "seed must be an int from 0"),
        ({"seed": True}, "seed must be an int from 0"),
    ],
)
def test_bad_settings_name_themselves(options, message):
    layer = options.pop("layer", 0)
    with pytest.raises(ValueError, match=message):
        ApproximateIndex(filled(), layer, **{"from_entries": 20, "lists": LISTS, "probes": LISTS, **options})


def test_bad_questions_name_themselves(faiss):
    with pytest.raises(TypeError, match="buffer must be a TensorBuffer, got list"):
        ApproximateIndex([], 0)
    index = whole(filled())
    for build in (False, True):
        if build:
            index.search(draw(1, SIZE), 1)
        with pytest.raises(ValueError, match="k must be an int of 1 or more, got 0"):
            index.search(draw(1, SIZE), 0)
        with pytest.raises(ValueError, match=rf"queries must be floats of shape \[queries, {SIZE}\]"):
            index.search(draw(1, SIZE + 1), 1)
        with pytest.raises(ValueError, match="queries must be finite"):
            index.search(torch.full((1, SIZE), torch.nan), 1)
        with pytest.raises(ValueError, match="min_relevance must be a number"):
            index.search(draw(1, SIZE), 1, min_relevance="0.5")


def test_without_the_package_it_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"faiss-cpu.*pip install 'ai-sleep-constructs\[faiss\]'"):
        ApproximateIndex(filled(), 0)
