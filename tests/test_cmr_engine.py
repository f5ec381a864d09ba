"""What a model with memories takes for one text, and what it does when it is called in parts."""

import copy
import gc

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ai_sleep_constructs.cmr import CMRTransformer, IntegratedCMRModel, RelevanceScorer
from ai_sleep_constructs.cmr.capture import StateCapture
from ai_sleep_constructs.cmr.configuration import MemoryConfig
from ai_sleep_constructs.cmr.engine import MemoryEngine
from ai_sleep_constructs.cmr.reweaving import Reweaver
from ai_sleep_constructs.cmr.scoring import SCORING_METHODS
from ai_sleep_constructs.cmr.tensor_buffer import TensorBuffer
from families import FAMILIES

ALL = {"target_layers": [1, 2], "relevance_threshold": 0.0, "scoring_method": "surprise", "max_states_per_layer": 500, "buffer_size": 5000}


@pytest.fixture(params=["mistral", "gpt2"])
def bare(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


def ids(rows, length, seed=1):
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def held(engine, sequence):
    """Of a text: the places that layer 1 remembers, and the tokens that the logit cache says followed each place."""
    places = sorted(e.position_idx for e in engine.buffer.retrieve_by_sequence(sequence) if e.layer_idx == 1)
    rows = engine.cache.buffer.layers[0]
    mine = rows["sequence"][rows.slots()] == sequence
    at, token = rows["position"][rows.slots()][mine], rows["field.token"][rows.slots()][mine]
    return places, token[at.argsort()].tolist(), at.sort().values.tolist()


def read(model, texts, caches, sizes):
    """Texts in turns, piece by piece."""
    pieces = [text.split(sizes, dim=1) for text in texts]
    for step in range(len(sizes)):
        for text, cache in zip(pieces, caches, strict=True):
            model(input_ids=text[step], past_key_values=cache, use_cache=True)


# Conversations


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_conversations_in_turns_stay_what_they_are(bare, kind):
    model = CMRTransformer(None, {**ALL, "logit_cache": 200}, model=bare)
    model.register_memory_hooks()
    texts = [ids(1, 30, seed=seed) for seed in (1, 2)]
    caches = [DynamicCache() if kind == "dynamic" else StaticCache(config=bare.config, max_cache_len=64) for _ in texts]
    read(model, texts, caches, [10, 1, 1, 18])
    for number, text in enumerate(texts):
        places, followers, at = held(model.engine, number)
        assert places == list(range(30)) and followers == text[0, 1:].tolist() and at == list(range(29))
    assert model.engine.next_sequence == 2
    relevance = {e.position_idx: e.relevance_score for e in model.memory_buffer.retrieve_by_sequence(0) if e.layer_idx == 1}
    assert relevance[10] > 0  # the first token of a piece has the logits of its own text before it
    assert len(model.engine.texts) == 2
    caches.clear()
    gc.collect()
    assert len(model.engine.texts) == 0


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_generate_goes_on_with_the_text_of_its_cache(llama, kind):
    model = IntegratedCMRModel(None, {**ALL, "logit_cache": 500}, model=llama)
    caches = [DynamicCache() if kind == "dynamic" else StaticCache(config=llama.config, max_cache_len=64) for _ in range(2)]
    said = [ids(1, 12, seed=seed) for seed in (1, 2)]
    for _ in range(2):  # a turn each, twice
        for number, cache in enumerate(caches):
            said[number] = model.generate(
                torch.cat([said[number], ids(1, 3, seed=9)], 1), past_key_values=cache, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for number, text in enumerate(said):
        places, followers, _ = held(model.engine, number)
        assert places == list(range(text.shape[1] - 1)) and followers == text[0, 1:-1].tolist()  # the last was written, and not read yet
    assert model.engine.next_sequence == 2


@pytest.mark.parametrize("how", [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}])
@torch.no_grad()
def test_padding_is_never_remembered_whatever_cache_is_made(llama, how):
    model = IntegratedCMRModel(None, {**ALL, "logit_cache": 500}, model=llama)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    for turn in range(2):
        written = model.generate(ids(2, 12), attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, **how)
        for row, length in enumerate((15, 10)):
            places, followers, _ = held(model.engine, 2 * turn + row)
            assert places == list(range(length)) and followers == written[row, -length:-1].tolist()


@torch.no_grad()
def test_an_unknown_cache_begins_a_text_and_a_cut_one_has_no_last_token(llama):
    model = CMRTransformer(None, {**ALL, "logit_cache": 500}, model=llama)
    cache, text = DynamicCache(), ids(1, 40)
    model(text[:, :10], past_key_values=cache)  # before there are hooks
    model.register_memory_hooks()
    model(ids(1, 10, seed=3), past_key_values=DynamicCache())
    info = model(text[:, 10:20], past_key_values=cache).memory_info
    assert info["sequence_ids"] == [1] and held(model.engine, 1)[0] == list(range(10, 20))
    cache.crop(-5)
    assert model(text[:, 15:25], past_key_values=cache).memory_info["sequence_ids"] == [1]
    places, followers, at = held(model.engine, 1)
    assert places == list(range(10, 25)) and dict(zip(at, followers, strict=True))[19] == int(text[0, 20]) and 14 in at
    cache.reset()
    assert model(text[:, :5], past_key_values=cache).memory_info["sequence_ids"] == [2]


# Parts of a model


@torch.no_grad()
def test_the_base_model_alone_is_none_of_the_memories_business(bare):
    text, other = ids(2, 20), ids(3, 9, seed=2)
    alone, head = bare.base_model(other)[0], bare.get_output_embeddings()
    model = IntegratedCMRModel(None, {**ALL, "places": "clamped", "logit_cache": 100}, model=bare)
    with_memories = [model(text).logits for _ in range(2)][1]
    before, number = model.memory_buffer.version, model.engine.next_sequence
    assert torch.equal(bare.base_model(other)[0], alone)  # other rows, other length: no memory of the last pass
    assert torch.equal(head(alone), torch.nn.functional.linear(alone, head.weight))
    assert model.memory_buffer.version == before and model.engine.next_sequence == number
    assert not torch.equal(model(text).logits, with_memories)  # goes on as before, with more memories


@torch.no_grad()
def test_a_pass_that_failed_leaves_nothing_for_the_base_model(llama):
    engine = MemoryEngine(llama, MemoryConfig(**ALL))
    alone = llama.base_model(ids(1, 5))[0]
    engine.attach()
    llama(input_ids=ids(1, 30))

    def fail(*args):
        raise RuntimeError("half-way")

    handle = llama.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="half-way"):
        llama(input_ids=ids(2, 10))
    handle.remove()
    assert torch.equal(llama.base_model(ids(1, 5))[0], alone) and len(engine.buffer) == 60
    engine.detach()


@torch.no_grad()
def test_nothing_of_the_size_of_the_logits_outlives_a_pass(llama):
    model = IntegratedCMRModel(None, {**ALL, "logit_cache": 100}, model=llama)
    output = model(ids(2, 37))
    wanted = output.logits.numel()
    del output
    gc.collect()
    left = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.numel() == wanted and x.shape[-1] == 128]
    assert not left


# Copies


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(bare):
    model = IntegratedCMRModel(None, {**ALL, "places": "clamped", "logit_cache": 100}, model=bare)
    text = ids(1, 25)
    model(text)
    twin = copy.deepcopy(model)
    assert twin.memory_enabled and model.memory_enabled and twin.model is not model.model
    assert torch.equal(twin(text).logits, model(text).logits)
    before = len(model.memory_buffer), len(model.engine.cache.buffer), model.engine.next_sequence
    twin(ids(2, 20, seed=4))
    assert (len(model.memory_buffer), len(model.engine.cache.buffer), model.engine.next_sequence) == before
    twin.remove_memory_hooks()
    assert model.memory_enabled and not any(m._forward_hooks or m._forward_pre_hooks for m in twin.model.modules())
    assert model(text).memory_info["recalled"] and not copy.deepcopy(twin).memory_enabled


@torch.no_grad()
def test_a_copy_of_the_bare_model_inside_is_bare(bare):
    text = ids(1, 25)
    alone = bare(input_ids=text).logits
    model = IntegratedCMRModel(None, {**ALL, "places": "clamped", "logit_cache": 100}, model=bare)
    model(text)
    before = model.memory_buffer.version
    twin = copy.deepcopy(model.model)
    assert torch.equal(twin(input_ids=text).logits, alone) and model.memory_buffer.version == before
    assert twin.state_dict().keys() == bare.state_dict().keys()


# Scores


class Seen:
    """What entered the attention of each layer: the states, the rotated queries, and the keys of the model's own cache."""

    def __init__(self, model, text, mask=None):
        self.queries, self.states, cache = {}, {}, DynamicCache()

        def recall(layer, query, positions):
            self.queries[layer.index] = query

        with Reweaver(model, recall), StateCapture(model, self.states.__setitem__):
            self.logits = model(input_ids=text, attention_mask=mask, past_key_values=cache).logits
        self.keys = [layer.keys for layer in cache.layers]
        nll = torch.nn.functional.cross_entropy(self.logits[:, :-1].flatten(0, 1), text[:, 1:].flatten(), reduction="none")
        self.nll = torch.nn.functional.pad(nll.view(len(text), -1), (1, 0))


@pytest.mark.parametrize("method", ["attention_based", "hybrid", "novelty", "surprise", "variance_based", "surprise_recency"])
@torch.no_grad()
def test_stored_scores_are_those_of_the_scorer_with_all_its_signals(bare, method):
    texts = [ids(2, 40, seed=seed) for seed in (1, 2)]
    seen = [Seen(bare, text) for text in texts]
    scorer, memories, expected = RelevanceScorer(48, method), {}, []
    for one in seen:
        for layer in (1, 2):
            held = torch.cat(memories.get(layer, [one.states[layer][0, :0]]))
            signals = {"queries": one.queries[layer], "keys": one.keys[layer], "nll": one.nll, "memories": held}
            known = SCORING_METHODS[method]
            expected.append(scorer(one.states[layer], layer_idx=layer, **{name: signals[name] for name in (*known.requires, *known.uses)}))
            memories.setdefault(layer, []).append(one.states[layer].flatten(0, 1))
    model = IntegratedCMRModel(None, {**ALL, "scoring_method": method, "retrieval_budget": 1, "bias": -99.0}, model=bare)  # memories are not felt
    for text in texts:
        model(text)
    found = {(e.sequence_id, e.layer_idx, e.position_idx): e.relevance_score for e in model.memory_buffer.get_all_entries()}
    assert len(found) == 2 * 2 * 2 * 40
    for number, scores in enumerate(expected):
        text, layer = number // 2, 1 + number % 2
        mine = torch.tensor([[found[2 * text + row, layer, place] for place in range(40)] for row in range(2)])
        assert torch.allclose(mine, scores, atol=1e-3), (method, text, layer)


@pytest.mark.parametrize("method", ["attention_based", "hybrid", "surprise"])
@torch.no_grad()
def test_what_is_written_is_remembered_at_the_rate_of_the_threshold(llama, method):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        memory = {**ALL, "target_layers": [1], "scoring_method": method, "relevance_threshold": 0.7, "places": "clamped"}
        model = IntegratedCMRModel(None, memory, model=llama)
        for seed in range(3):
            model.generate(ids(1, 10, seed=seed), max_new_tokens=60, min_new_tokens=60, do_sample=True, use_cache=use_cache)
        found.append([(e.sequence_id, e.position_idx) for e in model.memory_buffer.get_all_entries() if e.position_idx >= 10])
        model.remove_memory_hooks()
    assert 0.2 < len(found[0]) / (3 * 59) < 0.4
    assert 0.2 < len(found[1]) / (3 * 59) < 0.4


# Budgets


@pytest.mark.parametrize(("kept", "size"), [("float32", 4), ("float16", 2), ("int8", 1)])
@torch.no_grad()
def test_a_buffer_takes_the_bytes_of_its_budget(bare, kept, size):
    model = IntegratedCMRModel(None, {**ALL, "buffer_size": 301, "state_dtype": kept, "places": "clamped", "logit_cache": 100}, model=bare)
    alone = model(ids(1, 40)).logits
    for seed in range(6):
        model(ids(1, 60, seed=seed))
    assert len(model.memory_buffer) == 301  # all of it is used
    most = 302 * TensorBuffer.bytes_for(48, 1, 1, dtype=model.memory_buffer.dtype)
    assert model.memory_buffer.nbytes <= most * 1.01 and most < 302 * (48 * size + 120)
    again = model(ids(1, 40)).logits
    assert bool(again.isfinite().all()) and not torch.allclose(again, alone, atol=1e-3)
    assert model.engine.cache.buffer.dtype == model.memory_buffer.dtype == getattr(torch, kept)


@torch.no_grad()
def test_what_a_model_evicts_can_be_found_in_its_files(llama, tmp_path):
    model = IntegratedCMRModel(None, {**ALL, "buffer_size": 40, "eviction_strategy": "lru", "spill": str(tmp_path / "cold")}, model=llama)
    first = model(ids(1, 20)).captured_memory_states[2][0]
    model(ids(1, 20, seed=2))
    found, memories = model.memory_buffer.search_spilled(first, 2, 1)
    assert model.memory_buffer.get_buffer_stats()["spilled_entries"] == 40 and memories.positions[:, 0].tolist() == list(range(20))
    assert bool((found > 0.999).all())
