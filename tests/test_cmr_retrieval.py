"""Retrieval strategies against plain calculations, clusters against exact search, and what must never come from the cache."""

import time

import pytest
import torch

from ai_sleep_constructs.cmr.buffer import LayeredMemoryBuffer
from ai_sleep_constructs.cmr.entry import RetrievalContext
from ai_sleep_constructs.cmr.matching import ContextualRelevanceScorer, MemoryHierarchy, MultiCriteriaRanker, best_cosine
from ai_sleep_constructs.cmr.retrieval import STRATEGIES, AdvancedMemoryRetriever, RetrievalCache

SIZE = 32
OPEN = {"similarity_threshold": -1.0}  # nothing is too dissimilar


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grouped(number, groups=40, size=SIZE, seed=0):
    "States around directions of their own, as those of a text are."
    return draw(groups, size, seed=99)[torch.arange(number) % groups] + 0.7 * draw(number, size, seed=seed)


def remembered(number=300, holes=True, layer=0, **options):
    "A buffer whose rows are not in one piece: a text in its middle was forgotten."
    buffer = LayeredMemoryBuffer(number + 60, number + 100, **options)
    for text, (states, start) in enumerate([(grouped(number // 2), 0), (draw(50, SIZE, seed=5), 0), (grouped(number - number // 2, seed=2), 0)]):
        score = torch.rand(len(states), generator=torch.Generator().manual_seed(text))
        buffer.store_states(states, layer, torch.arange(start, start + len(states)), score, text)
    if holes:
        buffer.clear_sequence(1)
    return buffer


def plain_cosine(queries, states):
    return torch.nn.functional.cosine_similarity(queries[:, None].double(), states[None].double(), dim=-1).amax(0)


def ask(states, budget=10, layer=0, **more):
    return RetrievalContext(7, layer, states, retrieval_budget=budget, **more)


# --- strategies against plain calculations ---

@pytest.mark.parametrize("holes", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 6])
def test_similarity_is_the_largest_cosine_to_any_state_that_counts(holes, dtype, number):
    buffer = remembered(holes=holes, dtype=dtype)
    queries, mask = draw(2, number + 1, SIZE, seed=8), torch.ones(2, number + 1)
    mask[:, 0] = 0
    queries[:, 0] = buffer.gather(0, torch.tensor([3, 4])).states.float()  # padding must not count
    scores, slots = AdvancedMemoryRetriever(SIZE, buffer, OPEN).retrieve(ask(queries, attention_mask=mask), "semantic_similarity")
    held = buffer.slots(0)
    exact = plain_cosine(queries[:, 1:].reshape(-1, SIZE), buffer.gather(0, held).states).topk(10)
    assert torch.allclose(scores.double(), exact.values, atol=1e-5)
    assert torch.equal(slots, held[exact.indices])


def test_the_threshold_keeps_out_what_is_less_similar():
    buffer, query = remembered(), draw(1, SIZE, seed=8)
    states = buffer.gather(0, buffer.slots(0)).states
    cosines = plain_cosine(query, states)
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    among = unit @ unit.T
    each = ~torch.eye(len(states), dtype=torch.bool)
    one = among.masked_fill(~each, -2)[::2].amax(1).quantile(0.1)  # of the 300 memories each second one is compared with all
    zero = (among[::2].sum() - 150) / (150 * 299)
    least = float((cosines.topk(4).values[3] - zero) / (one - zero)) - 1e-5
    found, _ = AdvancedMemoryRetriever(SIZE, buffer, {"similarity_threshold": least}).retrieve(ask(query), "semantic_similarity")
    assert len(found) == 4 and torch.allclose(found.double(), cosines.topk(4).values, atol=1e-5)
    for sign, least, expected in ((1.0, 1.0, range(1, 10)), (1.0, -1.0, [10]), (-1.0, -1.0, [10]), (-1.0, 1.0, [0])):
        found, _ = AdvancedMemoryRetriever(SIZE, buffer, {"similarity_threshold": least}).retrieve(ask(sign * states[5]), "semantic_similarity")
        assert len(found) in expected, (sign, least)


def test_products_in_blocks_are_the_same(monkeypatch):
    queries, states = draw(50, SIZE), grouped(300)
    whole = best_cosine(queries, states), ContextualRelevanceScorer(4)(queries, states)
    monkeypatch.setattr("ai_sleep_constructs.cmr.matching._PRODUCTS", 2000)
    assert torch.allclose(best_cosine(queries, states), whole[0], atol=1e-6)
    assert torch.allclose(ContextualRelevanceScorer(4)(queries, states), whole[1], atol=1e-4)


def test_contextual_relevance_is_the_attention_received_over_blocks_of_channels():
    queries, states = draw(6, SIZE), 100 * grouped(200)
    expected = torch.zeros(200, dtype=torch.float64)
    for head in range(4):
        part = slice(head * 8, head * 8 + 8)
        cosines = torch.nn.functional.cosine_similarity(queries[:, None, part].double(), states[None, :, part].double(), dim=-1)
        expected += (10 * cosines).softmax(-1).mean(0) / 4
    assert torch.allclose(ContextualRelevanceScorer(4)(queries, states).double(), 200 * expected, atol=1e-4)
    buffer = remembered()
    held = buffer.slots(0)
    retriever = AdvancedMemoryRetriever(SIZE, buffer, {"context_heads": 4})
    _, slots = retriever.retrieve(ask(queries), "contextual_relevance")
    assert torch.equal(slots, held[ContextualRelevanceScorer(4)(queries, buffer.gather(0, held).states).topk(10).indices])


def plain_ranking(weights, criteria, states, k):
    "The greedy choice over all memories, one at a time."
    unit = torch.nn.functional.normalize(states.double(), dim=-1)
    base = torch.zeros(len(states), dtype=torch.float64)
    for name, values in criteria.items():
        values = values.double()
        base += weights.get(name, 0.0) * (values - values.min()) / (values.max() - values.min())
    chosen = []
    for _ in range(k):
        nearest = (unit @ unit[chosen].T).amax(1) if chosen else torch.full_like(base, -1.0)
        value = base + weights.get("diversity", 0.0) * (1 - nearest) / 2
        value[chosen] = -torch.inf
        chosen.append(int(value.argmax()))
    return chosen


@pytest.mark.parametrize("weights", [
    {"relevance": 0.4, "similarity": 0.3, "recency": 0.2, "diversity": 0.1}, {"similarity": 1.0}, {"recency": 2.0}, {"relevance": 1.0},
    {"similarity": 0.5, "diversity": 0.5}, {"relevance": 0.2, "diversity": 5.0}, {"diversity": 1.0},
])
def test_the_weights_that_are_given_are_used(weights):
    buffer, query = remembered(), grouped(3, seed=4)
    held = buffer.slots(0)
    memories = buffer.gather(0, held)
    criteria = {"relevance": memories.relevance, "similarity": plain_cosine(query, memories.states), "recency": torch.arange(len(held))}
    stored = buffer.layers[0]["stored"][held]
    criteria["recency"] = stored - stored.min()
    retriever = AdvancedMemoryRetriever(SIZE, buffer, {"criteria_weights": weights})
    _, slots = retriever.retrieve(ask(query, 25), "multi_criteria")
    assert slots.tolist() == held[plain_ranking(weights, criteria, memories.states, 25)].tolist()
    retriever.register_task("mine", weights)
    _, by_task = AdvancedMemoryRetriever.retrieve(retriever, ask(query, 25, task_type="mine"), "task_specific")
    assert torch.equal(by_task, slots)


def test_more_than_there_is_can_be_ranked():
    assert sorted(MultiCriteriaRanker()(*torch.rand(3, 5), draw(5, 8), 9)[1].tolist()) == [0, 1, 2, 3, 4]


def test_an_ensemble_adds_reciprocal_ranks():
    buffer, query = remembered(), grouped(3, seed=4)
    held = buffer.slots(0)
    memories = buffer.gather(0, held)
    views = [plain_cosine(query, memories.states), ContextualRelevanceScorer(8)(query, memories.states), memories.relevance, torch.arange(len(held))]
    points = dict.fromkeys(held.tolist(), 0.0)
    for view, weight in zip(views, (1, 1, 0.5, 0.25), strict=True):
        for rank, place in enumerate(view.argsort(descending=True).tolist()):
            points[int(held[place])] += weight / (60 + rank)
    scores, slots = AdvancedMemoryRetriever(SIZE, buffer).retrieve(ask(query), "hybrid_ensemble")
    best = sorted(points, key=lambda slot: -points[slot])[:10]
    assert set(slots.tolist()) == set(best) and scores.tolist() == pytest.approx([points[slot] for slot in best], rel=1e-5)


# --- many questions at once ---

@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_of_many_questions_finds_what_it_finds_alone_where_there_is_nothing_else_than_it_may_see(strategy):
    states, scores = torch.cat([grouped(100), draw(100, SIZE, seed=5)]), torch.rand(200, generator=torch.Generator().manual_seed(1))
    queries, seen = grouped(5, seed=4), (200, 120, 7, 2, 0)
    config = {**OPEN, "probes": 32, "context_heads": 4}

    def made(number):
        buffer = LayeredMemoryBuffer(200, 200)
        buffer.store_states(states[:number], 0, torch.arange(number), scores[:number])
        return AdvancedMemoryRetriever(SIZE, buffer, config, {"mine": {"similarity": 0.5, "diversity": 0.5}})

    visible = torch.arange(200) < torch.tensor(seen)[:, None]
    whole = made(200)
    found = whole.retrieve_many(queries, 0, 5, strategy, visible=visible, task_type="mine")
    assert found.shape == (5, 5)
    for query, number, mine in zip(queries, seen, found, strict=True):
        alone = made(number).retrieve(ask(query, 5, task_type="mine"), strategy)[1].tolist()
        assert mine.tolist() == alone + [-1] * (5 - len(alone)) and len(alone) == min(number, 5)
    assert torch.equal(whole.retrieve_many(queries[:1], 0, 5, strategy, task_type="mine"), found[:1])
    assert int(whole.memory_buffer.layers[0]["accesses"].sum()) == 0


def test_many_questions_that_cannot_be_asked_name_themselves():
    _, retriever, _ = retriever_and_context()
    for call, words in (
        (lambda: retriever.retrieve_many(draw(2, 5), 0, 3), "queries must have 32 channels, got 5"),
        (lambda: retriever.retrieve_many(draw(2, SIZE), 0, 0), "k must be"),
        (lambda: retriever.retrieve_many(draw(2, SIZE), 0, 3, visible=torch.ones(2, 5, dtype=torch.bool)), r"visible must have shape \[2, 300\]"),
        (lambda: retriever.retrieve_many(draw(2, SIZE), 0, 3, "task_specific", task_type="unheard"), "unheard"),
        (lambda: retriever.retrieve_many(draw(2, SIZE), 0, 3, "telepathy"), "telepathy"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert retriever.retrieve_many(draw(2, SIZE), 9, 3).tolist() == [[-1] * 3] * 2


# --- clusters ---

def recall(retriever, queries, budget=10):
    found = 0
    for query in queries:
        exact = retriever.retrieve(ask(query, budget), "semantic_similarity")[1]
        found += int(torch.isin(retriever.retrieve(ask(query, budget), "hierarchical")[1], exact).sum())
    return found / (budget * len(queries))


def test_clusters_find_what_exact_search_finds():
    buffer = LayeredMemoryBuffer(2000, 2000, "fifo")
    buffer.store_states(grouped(2000), 0, torch.arange(2000), torch.ones(2000))
    queries = grouped(40, seed=3)
    shares = {probes: recall(AdvancedMemoryRetriever(SIZE, buffer, {**OPEN, "probes": probes}), queries) for probes in (1, 4, 8, 32)}
    print("recall of the ten most similar of 2,000, by clusters looked into:", shares)
    assert shares[32] == 1.0 and shares[8] >= 0.9 and 0.2 < shares[1] < shares[8]


def test_clusters_follow_memories_that_come_and_go():
    buffer = LayeredMemoryBuffer(1000, 1000, "fifo")
    buffer.store_states(grouped(1000), 0, torch.arange(1000), torch.ones(1000))
    retriever = AdvancedMemoryRetriever(SIZE, buffer, {**OPEN, "probes": 8})
    queries = grouped(30, seed=3)
    assert recall(retriever, queries) >= 0.85
    tree = retriever._trees[0][0]
    assert tree.fitted == 1000 and tree.added == 0
    for step in range(6):  # over half of the memories are replaced, by some in directions that were not there before
        new = draw(8, SIZE, seed=50)[torch.arange(100) % 8] + 0.5 * draw(100, SIZE, seed=60 + step)
        buffer.store_states(new, 0, 1000 + 100 * step + torch.arange(100), torch.ones(100))
        last = retriever.retrieve(ask(new[-1], 1), "hierarchical")
        assert int(buffer.gather(0, last[1]).positions) == 1099 + 100 * step, "what was just stored is found at once"
        assert tree.added == 100 * ((step + 1) % 3), "a quarter may join, then the clusters are made anew"
    assert recall(retriever, torch.cat([queries, draw(8, SIZE, seed=50)])) >= 0.85


def test_few_clusters_still_fill_the_budget():
    buffer = remembered()
    retriever = AdvancedMemoryRetriever(SIZE, buffer, {**OPEN, "probes": 1})
    for budget in (1, 120, 300, 1000):
        slots = retriever.retrieve(ask(draw(SIZE, seed=8), budget), "hierarchical")[1]
        assert len(slots) == min(budget, 300) == len(slots.unique())


def test_nearest_clusters_come_first_and_suffice():
    tree = MemoryHierarchy(10)
    of = tree.fit(grouped(200, groups=10))
    sizes = of.bincount(minlength=10)
    few = tree.nearest(draw(1, SIZE), 2, sizes, 0)
    more = tree.nearest(draw(1, SIZE), 2, sizes, 100)
    assert len(few) == 2 and torch.equal(more[:2], few) and int(sizes[more].sum()) >= 100 > int(sizes[more[:-1]].sum())


# --- whole neighbourhoods ---

def test_a_memory_comes_with_its_successors_then_what_was_before():
    buffer = LayeredMemoryBuffer(100, 100)
    states = torch.eye(64)[:20]
    buffer.store_states(states, 0, torch.arange(20), torch.ones(20))
    query = 3 * states[10] + 2 * states[12] + states[1]
    for budget, expected in ((1, [10]), (2, [10, 11]), (5, [10, 11, 12, 9, 13]), (8, [10, 11, 12, 9, 13, 1, 2, 3])):
        retriever = AdvancedMemoryRetriever(64, buffer, {**OPEN, "neighbours_before": 1, "neighbours_after": 2})
        scores, slots = retriever.retrieve(ask(query, budget), "semantic_similarity")
        found = buffer.gather(0, slots).positions.tolist()
        assert found == ([10, 11, 12, 9, 13, 14, 1, 2] if budget == 8 else expected), budget
        assert scores.diff().le(0).all() and len(slots) == budget


# --- the cache ---

def retriever_and_context(**config):
    buffer = remembered()
    return buffer, AdvancedMemoryRetriever(SIZE, buffer, {**OPEN, **config}), ask(draw(2, SIZE, seed=8), task_type="mine")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_answer_from_the_cache_is_the_same_and_counts_as_use(strategy):
    buffer, retriever, context = retriever_and_context()
    retriever.register_task("mine", "contextual_relevance")
    first = retriever.retrieve(context, strategy)
    kept = first[0].clone(), first[1].clone()
    first[0].zero_(), first[1].zero_()  # what a caller does to an answer is the caller's
    again = retriever.retrieve(context, strategy)
    again[1].zero_()
    third = retriever.retrieve(context, strategy)
    assert torch.equal(third[0], kept[0]) and torch.equal(third[1], kept[1]) and retriever.cache.hits == 2
    assert buffer.layers[0]["accesses"][kept[1]].tolist() == [3] * len(kept[1])
    other = AdvancedMemoryRetriever(SIZE, buffer, {**OPEN, "cache_size": 0})
    other.register_task("mine", "contextual_relevance")
    assert torch.equal(other.retrieve(context, strategy)[1], kept[1]) and len(other.cache) == other.cache.misses == 0


def test_a_change_of_the_layer_makes_old_answers_void_and_another_layer_does_not():
    buffer, retriever, context = retriever_and_context()
    retriever.retrieve(context, "semantic_similarity")
    buffer.store_states(draw(1, SIZE), 1, torch.tensor([0]), torch.ones(1))
    retriever.retrieve(context, "semantic_similarity")
    assert retriever.cache.hits == 1
    slot = buffer.store_states(context.queries[:1], 0, torch.tensor([900]), torch.ones(1))
    assert int(retriever.retrieve(context, "semantic_similarity")[1][0]) == int(slot) and retriever.cache.hits == 1


def test_a_task_that_is_registered_anew_is_asked_anew():
    _, retriever, context = retriever_and_context()
    retriever.register_task("mine", {"similarity": 1.0})
    first = retriever.retrieve(context, "task_specific")[1]
    retriever.register_task("mine", {"recency": 1.0})
    second = retriever.retrieve(context, "task_specific")[1]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("strategy", ["semantic_similarity", "hierarchical"])
def test_nothing_is_left_of_memories_that_a_restore_replaced(strategy):
    buffer = LayeredMemoryBuffer(50, 50)
    empty = buffer.snapshot()
    retriever = AdvancedMemoryRetriever(SIZE, buffer, {**OPEN, "probes": 1})
    query = draw(1, SIZE, seed=8)
    places = []
    for seed in (1, 2):
        buffer.store_states(draw(50, SIZE, seed=seed), 0, torch.arange(50), torch.ones(50))
        exact = plain_cosine(query, draw(50, SIZE, seed=seed))
        _, slots = retriever.retrieve(ask(query, 50), strategy)
        places.append(slots)
        assert torch.equal(slots, exact.argsort(descending=True))
        buffer.restore(empty)
        assert retriever.retrieve_memories(ask(query, 50), strategy) == []
    assert not torch.equal(*places)


def test_the_cache_is_bounded_and_the_least_used_leaves():
    cache = RetrievalCache(2)
    for name in ("a", "b"):
        cache.put(cache.key(name), name)
    assert cache.get(cache.key("a")) == "a"
    cache.put(cache.key("c"), "c")
    assert len(cache) == 2 and cache.get(cache.key("b")) is None and cache.get(cache.key("a")) == "a" and (cache.hits, cache.misses) == (2, 1)
    x = torch.zeros(4)
    keys = {cache.key(x), cache.key(x.double()), cache.key(x[:3]), cache.key(x.view(2, 2)), cache.key(x, 1), cache.key(x + 1)}
    assert len(keys) == 6 and cache.key(x) == cache.key(torch.zeros(4, 2)[:, 0])
    _, retriever, _ = retriever_and_context(cache_size=3)
    for seed in range(6):
        retriever.retrieve(ask(draw(SIZE, seed=seed)), "semantic_similarity")
    assert len(retriever.cache) == 3


# --- objects, statistics, errors ---

def test_objects_and_statistics():
    buffer, retriever, context = retriever_and_context()
    _, slots = retriever.retrieve(context, "semantic_similarity")
    found = retriever.retrieve_memories(context, "semantic_similarity")
    retriever.retrieve_memories(context)
    memories = buffer.gather(0, slots)
    assert [entry.position_idx for entry in found] == memories.positions.tolist()
    assert [entry.sequence_id for entry in found] == memories.sequences.tolist()
    assert torch.equal(torch.stack([entry.hidden_state for entry in found]), memories.states)
    assert all(entry.access_count == 2 and entry.last_access > 0 for entry in found)
    stats = retriever.get_retrieval_stats()
    assert stats["total_retrievals"] == 3 and stats["cache_hits"] == 1 and stats["avg_retrieval_time"] > 0
    assert stats["strategy_usage"] == {"semantic_similarity": 2, "multi_criteria": 1}


def test_what_cannot_be_asked_names_itself_and_changes_nothing():
    buffer, retriever, _ = retriever_and_context()
    query = draw(2, SIZE)
    query[1, 3] = torch.nan
    for strategy in STRATEGIES:
        with pytest.raises(ValueError, match="current_hidden_states must be finite.* 1 non-finite"):
            retriever.retrieve(ask(query), strategy)
    for context, strategy, words in (
        (ask(query[:1, :5]), "multi_criteria", "must have 32 channels, got 5"), (ask(query[:1]), "telepathy", "telepathy"),
        (ask(query[:1], task_type="unheard"), "task_specific", "unheard"),
    ):
        with pytest.raises(ValueError, match=words):
            retriever.retrieve(context, strategy)
    for config, words in (
        ({"max_cluster": 3}, "max_cluster"), ({"probes": 0}, "probes"), ({"similarity_threshold": 2}, "similarity_threshold"), ({"cache_size": -1}, "cache_size"),
        ({"criteria_weights": {"luck": 1}}, "luck"), ({"criteria_weights": {"recency": -1}}, "recency"), ({"context_heads": 5}, "context_heads"),
        ({"max_clusters": 0}, "max_clusters"), ({"neighbours_after": -1}, "neighbours_after"),
    ):
        with pytest.raises(ValueError, match=words):
            AdvancedMemoryRetriever(SIZE, buffer, config).retrieve(ask(draw(SIZE)), "hierarchical")
    assert int(buffer.layers[0]["accesses"].sum()) == 0 and retriever.get_retrieval_stats()["total_retrievals"] == 0
    assert retriever.retrieve(ask(draw(2, SIZE), attention_mask=torch.zeros(2)))[1].tolist() == []


# --- speed (printed, not asserted) ---

def test_speed_against_the_bare_product():
    size, number = 256, 4096
    buffer = LayeredMemoryBuffer(number, number)
    states = draw(number, size)
    buffer.store_states(states, 0, torch.arange(number), torch.ones(number))

    def fastest(call):
        times = []
        for _ in range(15):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return min(times)

    for queries in (1, 32, 256):
        asked = draw(queries, size, seed=1)
        retriever = AdvancedMemoryRetriever(size, buffer, {**OPEN, "cache_size": 0})
        ours = fastest(lambda: retriever.retrieve(ask(asked, 16), "semantic_similarity"))  # noqa: B023
        bare = fastest(lambda: (asked @ states.T).topk(16))  # noqa: B023
        print(f"{queries} states over {number:,} memories: {ours * 1000:.2f} ms, product and top-k {bare * 1000:.2f} ms, {ours / bare:.2f}x")
    exact = (torch.nn.functional.normalize(asked, dim=1) @ torch.nn.functional.normalize(states, dim=1).T).amax(0).topk(16).indices
    assert torch.equal(retriever.retrieve(ask(asked, 16), "semantic_similarity")[1], exact)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memories_in_int8_are_found_as_well(strategy):
    states = torch.randn(300, 32, generator=torch.Generator().manual_seed(3))
    found = []
    for dtype in (torch.float32, torch.int8):
        buffer = LayeredMemoryBuffer(300, 300, dtype=dtype)
        buffer.store_states(states, 0, torch.arange(300), torch.linspace(0, 1, 300))
        retriever = AdvancedMemoryRetriever(32, buffer, {"similarity_threshold": -1.0})
        found.append(set(retriever.retrieve(RetrievalContext(1, 0, states[40:44] + 0.05, retrieval_budget=20), strategy)[1].tolist()))
    assert len(found[0] & found[1]) >= 18
