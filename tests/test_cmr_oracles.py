"""Memories are exact at both ends in every family, and nothing of them is left when they are off."""

import copy

import pytest
import torch

from ai_sleep_constructs.cmr.buffer import LayeredMemoryBuffer
from ai_sleep_constructs.cmr.capture import StateCapture
from ai_sleep_constructs.cmr.configuration import MemoryConfig
from ai_sleep_constructs.cmr.engine import MemoryEngine
from ai_sleep_constructs.cmr.layers import key_fields, memory_layers
from ai_sleep_constructs.cmr.logit_cache import LogitCache
from ai_sleep_constructs.cmr.recall import BufferRecall
from ai_sleep_constructs.cmr.retrieval import STRATEGIES, AdvancedMemoryRetriever
from ai_sleep_constructs.cmr.reweaving import Reweaver
from ai_sleep_constructs.cmr.streaming import MemoryStream, band
from ai_sleep_constructs.cmr.tensor_buffer import TensorBuffer
from families import families

FAMILIES = families(initializer_range=0.2)


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


def ids(rows, length, seed=1):
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_all_layers_at_true_positions_are_the_full_context(model, attention):
    model.set_attn_implementation(attention)
    text, old = ids(1, 90), 60
    layers = memory_layers(model)
    buffer = TensorBuffer(100, 1000, fields=key_fields(layers[0]))

    def keep(index, states):
        fields = {"key": layers[index].keys_values(states[0])[0]}
        buffer.store_states(states[0], index, torch.arange(old), torch.full((old,), 0.5), fields=fields)

    with StateCapture(model, keep):
        model(input_ids=text[:, :old])
    new = torch.arange(old, 90)[None]
    whole = model(input_ids=text).logits[:, old:]
    alone = model(input_ids=text[:, old:], position_ids=new).logits
    with Reweaver(model, BufferRecall(buffer, budget=None, window=1, places="true")):
        woven = model(input_ids=text[:, old:], position_ids=new).logits
        batch = model(input_ids=text[:, old:].expand(3, -1), position_ids=new.expand(3, -1)).logits
    assert float((alone - whole).abs().max()) > 1e-2
    assert float((woven - whole).abs().max()) < 1e-4 and float((batch - whole).abs().max()) < 1e-4
    with Reweaver(model, BufferRecall(buffer, budget=30, window=1, places="true")):
        half = model(input_ids=text[:, old:], position_ids=new).logits
    assert float((half - whole).abs().max()) > 1e-4  # a budget is a budget
    assert torch.equal(model(input_ids=text[:, old:], position_ids=new).logits, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_an_empty_memory_changes_no_bit(model, dtype):
    model = model.to(dtype)
    text = ids(2, 40)
    mask = torch.ones_like(text)
    mask[0, :7] = 0
    bare, padded = model(input_ids=text).logits, model(input_ids=text, attention_mask=mask).logits
    written = model.generate(text, attention_mask=mask, max_new_tokens=5, do_sample=False)
    before = hooks(model)
    engine = MemoryEngine(model, MemoryConfig(target_layers=[0, 1, 2], relevance_threshold=1.0, logit_cache=10))
    engine.attach()
    assert hooks(model) > before
    try:
        engine.cache.remember = lambda *a, **k: None  # nothing is ever remembered
        assert torch.equal(model(input_ids=text).logits, bare)
        assert torch.equal(model(input_ids=text, attention_mask=mask).logits, padded)
        assert torch.equal(model.generate(text, attention_mask=mask, max_new_tokens=5, do_sample=False), written)
        assert len(engine.buffer) == 0
    finally:
        engine.detach()
    assert hooks(model) == before and not engine.attached
    assert all(type(m.config) is type(model.config) and "memories" not in m.config._attn_implementation
               for m in model.modules() if hasattr(m, "config"))
    assert torch.equal(model(input_ids=text).logits, bare)


@torch.no_grad()
def test_what_is_remembered_comes_back_and_goes_away(model):
    told, asked = ids(2, 40), ids(1, 20, seed=2)
    bare = model(input_ids=asked).logits
    engine = MemoryEngine(model, MemoryConfig(target_layers=[1], relevance_threshold=0.0, places="clamped", distance=30, logit_cache=200))
    engine.attach()
    model(input_ids=told)
    assert engine.buffer.count(1) == 80 and engine.cache.buffer.count() == 78
    with_memories = model(input_ids=asked).logits
    assert not torch.equal(with_memories, bare) and bool(with_memories.isfinite().all())
    engine.detach()
    assert torch.equal(model(input_ids=asked).logits, bare)


@torch.no_grad()
def test_texts_do_not_see_their_own_memories_without_a_window(model):
    engine = MemoryEngine(model, MemoryConfig(target_layers=[1], relevance_threshold=0.0))
    engine.attach()
    text = ids(1, 30)
    from transformers import DynamicCache

    cache = DynamicCache()
    model(input_ids=text[:, :20], past_key_values=cache)
    model(input_ids=text[:, 20:], past_key_values=cache)
    assert engine.recall.recalled == {} and engine.buffer.count(1) == 30
    assert engine.buffer.gather(1, engine.buffer.slots(1)).positions.tolist() == list(range(30))
    model(input_ids=text)
    assert engine.recall.recalled[1].shape == (1, 30)
    engine.detach()


def test_an_exception_in_the_model_leaves_nothing_half_done(model):
    engine = MemoryEngine(model, MemoryConfig(target_layers=[0, 2], relevance_threshold=0.0))
    engine.attach()
    block = memory_layers(model, [1])[0].module

    def fail(*args):
        raise RuntimeError("half-way")

    handle = block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="half-way"):
        model(input_ids=ids(1, 10))
    handle.remove()
    assert len(engine.buffer) == 0
    model(input_ids=ids(1, 10))
    assert len(engine.buffer) == 20
    engine.detach()
    assert hooks(model) == 0


def test_training_goes_through(model):
    engine = MemoryEngine(model, MemoryConfig(target_layers=[1], relevance_threshold=0.0, logit_cache=50, places="clamped"))
    engine.attach()
    with torch.no_grad():
        model(input_ids=ids(1, 30))
    model.train()
    batch = ids(2, 20, seed=3)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    assert bool(loss.isfinite()) and all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert not any(column.requires_grad for rows in engine.buffer.layers.values() for column in rows.columns.values())
    engine.detach()


def test_a_copy_of_a_woven_model_is_a_bare_model(model):
    with torch.no_grad():
        bare = model(input_ids=ids(1, 10)).logits
        with Reweaver(model, lambda *_: pytest.fail("the copy asked")):
            twin = copy.deepcopy(model)
            assert torch.equal(twin(input_ids=ids(1, 10)).logits, bare)


def test_a_stream_has_constant_memory_and_a_refused_model():
    torch.manual_seed(0)
    llama = FAMILIES["llama"]().eval()
    (layer,) = memory_layers(llama, [1])
    cache, buffer = LogitCache(48, 64, neighbours=4), TensorBuffer(50, 50, "fifo", fields=key_fields(layer))
    recall = BufferRecall(buffer, budget=8, places="clamped", distance=20)
    with MemoryStream(llama, window=32, chunk=16, cache=cache, recall=recall, layers=[1]) as stream:
        stream.LIMIT = 100
        sizes = set()
        for seed in range(12):
            nll = stream.read(ids(1, 50, seed=seed)[0])
            assert bool(nll[1:].isfinite().all()) and len(nll) == 50
            if seed:  # the index of places is as long as the memories were
                sizes.add((buffer.nbytes, cache.buffer.nbytes, stream._kv.layers[0].keys.shape[2]))
        assert len(sizes) == 1 and stream.position == 600 and stream._offset >= 500
        assert int(buffer.gather(1, buffer.slots(1)).positions.max()) == 599
        with pytest.raises(ValueError, match="0..127"):
            stream.read([1, 500])
        assert stream.position == 600
    assert hooks(llama) == 0
    with pytest.raises(ValueError, match="256 tokens together"):
        MemoryStream(FAMILIES["gpt2"](), window=200, chunk=64)
    with pytest.raises(ValueError, match="chunk"):
        MemoryStream(llama, window=8, chunk=9)


@torch.no_grad()
def test_a_stream_with_learned_positions_reads_its_window_anew_when_they_end():
    torch.manual_seed(0)
    gpt2 = FAMILIES["gpt2"]().eval()
    text, window, chunk = ids(1, 600)[0], 32, 16
    (layer,) = memory_layers(gpt2, [1])
    buffer = TensorBuffer(1000, 1000, "fifo", fields=key_fields(layer))
    with MemoryStream(gpt2, window=window, chunk=chunk) as stream:
        found = stream.read(text)
    recall = BufferRecall(buffer, budget=8)
    with MemoryStream(gpt2, window=window, chunk=chunk, recall=recall, layers=[1]) as stream:
        stream.read(text)
    assert buffer.gather(1, buffer.slots(1)).positions.tolist() == list(range(600))  # what was read anew is not stored anew
    expected, begin, start, last = torch.full((600,), torch.nan), 0, 0, torch.zeros(128)
    while start < 600:  # by pieces of at most as many positions as there are, each with the window before it
        end = begin + 256 // chunk * chunk
        piece = text[begin:end]
        logits = gpt2(input_ids=piece[None], attention_mask=band(0, len(piece), window, gpt2.lm_head.weight), use_cache=False).logits[0]
        nll = torch.nn.functional.cross_entropy(logits[:-1], piece[1:], reduction="none")
        fresh = max(start, 1)  # the first token of a piece is predicted by the last logits of the one before
        expected[fresh : begin + len(piece)] = nll[fresh - begin - 1 :]
        if begin:
            expected[start] = torch.nn.functional.cross_entropy(last, text[start])
        last, start, begin = logits[-1], end, end - window
    assert torch.allclose(found[1:], expected[1:], atol=1e-5)


def test_reading_in_other_pieces_gives_the_same():
    torch.manual_seed(0)
    llama = FAMILIES["llama"]().eval()
    text, read = ids(1, 300)[0], []
    for sizes in ([300], [7, 150, 143]):
        with MemoryStream(llama, window=32, chunk=1, cache=LogitCache(48, 100, neighbours=4)) as stream:
            read.append(torch.cat([stream.read(part) for part in text.split(sizes)]))
    assert torch.allclose(read[0][1:], read[1][1:], atol=1e-5)


def test_budgets_hold_under_anything():
    generator = torch.Generator().manual_seed(0)
    for strategy in ("lru", "relevance", "lru_relevance", "surprise", "fifo", "random"):
        buffer = LayeredMemoryBuffer(20, 45, strategy)
        for step in range(60):
            number = int(torch.randint(1, 30, (1,), generator=generator))
            layer = int(torch.randint(0, 4, (1,), generator=generator))
            slots = buffer.store_states(
                torch.randn(number, 6, generator=generator), layer, torch.arange(number), torch.rand(number, generator=generator), step % 5)
            assert len(set(slots[slots >= 0].tolist())) == int((slots >= 0).sum())
            assert len(buffer) <= 45 and all(rows.count <= 20 and rows.count == int(rows.valid.sum()) for rows in buffer.layers.values())
            if step % 7 == 0:
                buffer.search(torch.randn(3, 6, generator=generator), layer, 5)
            if step % 11 == 10:
                buffer.clear_sequence(step % 5)
                assert not buffer.retrieve_by_sequence(step % 5)
        for step in range(10):
            buffer.store_states(torch.randn(20, 6, generator=generator), step % 4, torch.arange(20), torch.full((20,), 0.9), 99)
        assert len(buffer) == 45, strategy  # all of a budget is used


@torch.no_grad()
def test_layers_recall_the_tokens_that_the_lowest_one_found():
    torch.manual_seed(0)
    llama = FAMILIES["llama"]().eval()
    layers = memory_layers(llama)
    buffer, text = TensorBuffer(60, 180, "fifo", fields=key_fields(layers[0])), ids(1, 80)

    def keep(index, states):
        # in another order in each layer, and the last layer misses some
        order = torch.randperm(60, generator=torch.Generator().manual_seed(index))[: 40 if index == 2 else 60]
        buffer.store_states(states[0, order], index, order, torch.full((len(order),), 0.5), fields={"key": layers[index].keys_values(states[0, order])[0]})

    with StateCapture(llama, keep):
        llama(input_ids=text[:, :60])
    found = {}
    for share in (True, False):
        recall = BufferRecall(buffer, budget=12, window=1, places="true", share=share, after=0)
        with Reweaver(llama, recall), StateCapture(llama, recall.states.__setitem__):
            for _ in range(2):  # every pass looks anew
                llama(input_ids=text[:, 60:], position_ids=torch.arange(60, 80)[None])
        found[share] = [set(buffer.gather(layer, slots[slots >= 0]).positions.tolist()) for layer, slots in recall.recalled.items()]
    first, second, last = found[True]
    held = set(buffer.gather(2, buffer.slots(2)).positions.tolist())
    assert 6 < len(first) <= 12 and first == second and last == first & held and last != first
    assert found[False][0] == first and found[False][1] != first


@pytest.mark.parametrize("find", ["states", "queries", *STRATEGIES])
@pytest.mark.parametrize("neighbours", [0, 1])
@torch.no_grad()
def test_no_token_is_moved_by_later_ones(find, neighbours):
    torch.manual_seed(0)
    llama = FAMILIES["llama"]().eval()
    text, nll = ids(1, 160)[0], []
    for end in (text[128:], text[128:].flip(0)):
        changed = torch.cat([text[:128], text[128:144], end[16:] if len(nll) == 0 else end[:16]])
        buffer = LayeredMemoryBuffer(200, 400, "fifo", fields=key_fields(memory_layers(llama)[0]))
        recall = BufferRecall(buffer, budget=64, places="clamped", distance=20, find="queries" if find == "queries" else "states", after=neighbours)
        if find in STRATEGIES:
            retriever = AdvancedMemoryRetriever(48, buffer, {"similarity_threshold": 0.0}, {"mine": {"similarity": 0.7, "diversity": 0.3}})
            recall.choose = lambda layer, queries, visible, k, r=retriever, s=find: r.retrieve_many(queries, layer, k, s, visible=visible, task_type="mine")
        cache = LogitCache(48, 200, neighbours=4)
        with MemoryStream(llama, window=32, chunk=32, recall=recall, layers=[1, 2], cache=cache) as stream:
            nll.append(stream.read(changed))
            assert all(int((slots >= 0).sum()) for slots in recall.recalled.values())
    first, second = nll
    assert torch.allclose(first[1:144], second[1:144], atol=1e-5) and float((first[144:] - second[144:]).abs().max()) > 0.01


@torch.no_grad()
def test_the_attention_that_is_given_out_is_that_over_memories_and_window(model):
    text, found = ids(2, 20, seed=4), {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        engine = MemoryEngine(model, MemoryConfig(
            target_layers=[1, 2], relevance_threshold=0.0, places="clamped", distance=30, scoring_method="variance_based", retrieval_budget=16))
        engine.attach()
        model(input_ids=ids(2, 30))
        mask = torch.ones_like(text)
        mask[1, :5] = 0
        found[attention] = model(input_ids=text, attention_mask=mask, output_attentions=attention == "eager")
        recalled = {layer: slots.shape[1] for layer, slots in engine.recall.recalled.items()}
        engine.detach()
    weights = found["eager"].attentions
    assert [w.shape for w in weights] == [(2, 6, 20, 20 + recalled.get(layer, 0)) for layer in range(3)]
    assert set(recalled) == {1, 2} and min(recalled.values()) > 0
    assert all(torch.allclose(w.sum(-1), torch.ones(2, 6, 20), atol=1e-5) for w in weights)
    assert float(weights[1][0, ..., : recalled[1]].sum()) > 0
    assert torch.allclose(found["eager"].logits[mask.bool()], found["sdpa"].logits[mask.bool()], atol=1e-4)
