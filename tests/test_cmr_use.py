"""Everyday use of models with memories: streams, reading without storing, forgetting, and mistakes that say what they are."""

import math

import pytest
import torch
from transformers import DynamicCache

from ai_sleep_constructs.cmr import CMRTransformer, FullCMRModel, IntegratedCMRModel, MemoryStream, RelevanceScorer
from ai_sleep_constructs.cmr.recall import BufferRecall
from ai_sleep_constructs.cmr.tensor_buffer import TensorBuffer
from ai_sleep_constructs.reference.loading import load_model
from ai_sleep_constructs.reference.architecture import attention_blocks
from ai_sleep_constructs.sleep.head_surgery import prune_groups

ALL = {"target_layers": [1, 2], "relevance_threshold": 0.0, "scoring_method": "surprise", "max_states_per_layer": 500, "places": "clamped"}


@pytest.fixture(scope="module")
def reference():
    return load_model("reference", dtype=torch.float32)


def ids(rows, length, seed=1):
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


# Streams


def test_a_stream_with_memories_knows_what_it_has_read(reference):
    lines = [f"def handler_{n}(request, {w}):\n    return request.{w}_{n * 7 % 13}\n" for n in range(16) for w in ("alpha", "gamma")]
    text = "".join(lines) * 2
    model = IntegratedCMRModel(
        None, {**ALL, "target_layers": [4, 5], "logit_cache": 2000, "buffer_size": 2000, "window": 64}, model=reference.model, tokenizer=reference.tokenizer)
    nll = model.stream(text, window=64, chunk=32)
    tokens = len(reference.tokenizer(text)["input_ids"])
    assert nll.shape == (tokens,) and bool(nll[0].isnan()) and bool(nll[1:].isfinite().all()) and model.memory_enabled
    held = model.memory_buffer.retrieve_by_sequence(0)
    assert sorted(e.position_idx for e in held if e.layer_idx == 5)[-1] == tokens - 1 and model.engine.next_sequence == 1
    size = model.memory_buffer.nbytes
    model.stream(text, window=64, chunk=32)
    assert model.memory_buffer.nbytes == size and len(model.memory_buffer) == 2000
    model.remove_memory_hooks()
    bare = model.stream(text, window=64, chunk=32)
    with MemoryStream(reference.model, window=64, chunk=32) as stream:
        assert torch.equal(stream.read(model.encode(text))[1:], bare[1:])
    bits = [float(one.nansum()) / math.log(2) / len(text.encode()) for one in (bare, nll)]
    assert bits[1] < 0.9 * bits[0], bits


@torch.no_grad()
def test_a_stream_keeps_to_the_configuration(llama):
    model = IntegratedCMRModel(None, {**ALL, "relevance_threshold": 0.7, "max_states_per_layer": 3}, model=llama)
    text = ids(1, 400)[0]
    model.stream(text, window=32, chunk=16)
    places = [e.position_idx for e in model.memory_buffer.get_all_entries() if e.layer_idx == 1]
    by_piece = torch.tensor(places).div(16, rounding_mode="floor").bincount()
    assert int(by_piece.max()) == 3 and 0.1 < len(places) / 400 < 3 / 16 and all(e.relevance_score >= 0.7 for e in model.memory_buffer.get_all_entries())
    before = model.memory_buffer.version
    with model.reading_only():
        model.stream(text, window=32, chunk=16)
    assert model.memory_buffer.version == before
    with pytest.raises(ValueError, match="chunk must be at most the window"):
        model.stream(text, window=16, chunk=32)
    assert model.memory_enabled and model.engine.next_sequence == 2
    for given in (model, llama):
        with pytest.raises(TypeError, match=r"stream\(\.\.\.\).*remove_memory_hooks"):
            MemoryStream(given)
    model.remove_memory_hooks()
    MemoryStream(llama).close()


@pytest.mark.parametrize("method", ["surprise", "novelty", "variance_based"])
def test_scores_in_a_stream_do_not_depend_on_the_pieces(llama, method):
    text, found = ids(1, 640)[0], []
    for chunk in (2, 64):
        buffer = TensorBuffer(1000, 1000, "fifo")
        recall = BufferRecall(buffer, budget=1, bias=-99.0)
        with MemoryStream(llama, window=64, chunk=chunk, recall=recall, layers=[1], scorer=RelevanceScorer(48, method)) as stream:
            stream.read(text)
        rows = buffer.layers[1]
        found.append(rows["relevance"][rows["position"][:640].argsort()][128:])
    least = 0.85 if method == "novelty" else 0.99  # novelty: by one to two windows before each token
    assert float((found[0] - found[1]).abs().mean()) < 0.06 and float(torch.stack(found).corrcoef()[0, 1]) > least


# Reading without storing, and forgetting


@torch.no_grad()
def test_reading_only_recalls_and_keeps_nothing(llama):
    model = IntegratedCMRModel(None, {**ALL, "logit_cache": 200}, model=llama)
    model(ids(1, 30))
    before, cached, cache = model.memory_buffer.version, model.engine.cache.buffer.version, DynamicCache()
    with model.reading_only():
        output = model(ids(1, 10, seed=2), past_key_values=cache)
        model.generate(ids(1, 5), max_new_tokens=4, do_sample=False)
    assert sum(output.memory_info["recalled"].values()) > 0 and output.memory_info["stored"] == 0
    assert model.memory_buffer.version == before and model.engine.cache.buffer.version == cached
    model(ids(1, 10, seed=3), past_key_values=cache)
    (text,) = model.engine.sequence.tolist()
    rows = model.engine.cache.buffer.layers[0]
    assert {e.position_idx for e in model.memory_buffer.retrieve_by_sequence(text)} == set(range(10, 20))
    assert rows["position"][rows.slots()][rows["sequence"][rows.slots()] == text].tolist() == list(range(10, 19))


@torch.no_grad()
def test_what_is_forgotten_is_gone(llama, tmp_path):
    model = IntegratedCMRModel(None, {**ALL, "logit_cache": 200, "spill": str(tmp_path), "buffer_size": 60}, model=llama)
    asked = ids(1, 10, seed=7)
    with model.reading_only():
        alone = model(asked).logits
    caches = [DynamicCache(), DynamicCache()]
    for seed, cache in enumerate(caches):
        model(ids(1, 20, seed=seed), past_key_values=cache)
    own = [model.engine.sequence.item() - 1, model.engine.sequence.item()]
    assert model.forget(own[0]) == 40 + 19 and not model.memory_buffer.retrieve_by_sequence(own[0])
    model(ids(1, 5, seed=9), past_key_values=caches[0])  # goes on, and its last token is not known any more
    rows = model.engine.cache.buffer.layers[0]
    mine = rows["sequence"][rows.slots()] == own[0]
    assert rows["position"][rows.slots()][mine].tolist() == [20, 21, 22, 23] and rows["field.context"][rows.slots()][mine][0, 1:].tolist() == [-1] * 7
    left = len(model.memory_buffer) + len(model.memory_buffer.spill) + 19 + 4
    assert model.forget() == left and len(model.memory_buffer) == len(model.engine.cache.buffer) == 0
    with model.reading_only():
        assert torch.equal(model(asked).logits, alone)
    assert model(ids(1, 5, seed=9), past_key_values=caches[1]).memory_info["sequence_ids"] == [own[1] + 2]
    with pytest.raises(ValueError, match="sequence_id must be None or an int, got '3'"):
        model.forget("3")


@torch.no_grad()
def test_a_hint_where_memories_cannot_show(llama):
    model = IntegratedCMRModel(None, ALL, model=llama)
    assert "window is None: memories of the same text are not recalled" in model(ids(1, 60)).memory_info["hint"]
    assert model(ids(1, 60, seed=2)).memory_info["hint"] is None  # it recalls the other text
    model.remove_memory_hooks()
    assert model(ids(1, 60)).memory_info["hint"] is None
    windowed = IntegratedCMRModel(None, {**ALL, "window": 16}, model=llama)
    assert "in pieces" in windowed(ids(1, 60)).memory_info["hint"]


def test_a_hint_where_the_logit_cache_has_no_say(llama):
    model = IntegratedCMRModel(None, {**ALL, "logit_cache": 200}, model=llama)
    with torch.no_grad():
        model(ids(1, 60))
        assert model(ids(1, 60, seed=2)).memory_info["hint"] is None
    assert "torch.no_grad()" in model(ids(1, 60, seed=2)).memory_info["hint"]


@torch.no_grad()
def test_a_model_with_heads_cut_out_is_saved_as_it_is(reference, tmp_path):
    cut = load_model("reference", dtype=torch.float32)
    prune_groups(attention_blocks(cut.model)[4], [1])
    model = IntegratedCMRModel(None, {**ALL, "target_layers": [4, 5]}, model=cut.model, tokenizer=cut.tokenizer)
    model(ids(1, 60))
    again = IntegratedCMRModel.from_pretrained(model.save_pretrained(tmp_path / "cut"), dtype=torch.float32)
    with model.reading_only(), again.reading_only():
        asked = ids(1, 9, seed=4)
        assert torch.equal(again(asked).logits, model(asked).logits)


# Mistakes


def test_mistakes_say_what_they_are(llama):
    model = FullCMRModel(None, {**ALL, "logit_cache": 10}, model=llama)
    text, cache = ids(2, 6), DynamicCache()
    model(text, past_key_values=cache)
    before, number = model.memory_buffer.version, model.engine.next_sequence
    for error, match, call in [
        (TypeError, "input_ids must be an integer tensor .* got str", lambda: model("def")),
        (TypeError, "input_ids must be an integer tensor .* got list", lambda: model([[1, 2]])),
        (ValueError, r"input_ids must be integers of shape \[batch, tokens\].*\[6\]", lambda: model(text[0])),
        (ValueError, "input_ids must be integers .*float32", lambda: model(text.float())),
        (ValueError, r"input_ids must be tokens in 0..127, got .*500", lambda: model(torch.tensor([[1, 500]]))),
        (ValueError, "input_ids must be integers .*at least one", lambda: model(text[:, :0])),
        (ValueError, r"attention_mask must be of shape \[2, 6\].*got \[2, 5\]", lambda: model(text, torch.ones(2, 5))),
        (ValueError, r"attention_mask must be of shape \[2, 12\].*6 tokens in the cache", lambda: model(text, torch.ones(2, 6), past_key_values=cache)),
        (TypeError, "attention_mask must be None or a tensor", lambda: model(text, [[1] * 6] * 2)),
        (TypeError, "input_ids must be an integer tensor .* got str", lambda: model.generate("def")),
        (ValueError, "input_ids must be integers", lambda: model.generate(text[0])),
        (ValueError, "attention_mask must be of shape", lambda: model.generate(text, attention_mask=torch.ones(1, 6))),
        (ValueError, "needs a tokenizer", lambda: model.retrieve("def")),
        (TypeError, "text must be an integer tensor .* got list", lambda: model.retrieve([1, 2])),
        (ValueError, r"text must be integers of shape \[tokens\]", lambda: model.retrieve(text)),
        (ValueError, r"text must be integers .*float32", lambda: model.retrieve(text[0].float())),
        (ValueError, "text must be integers", lambda: model.stream(text)),
        (ValueError, "budget must be an int of 1 or more, got 0", lambda: model.retrieve(text[0], 0)),
        (TypeError, "memory_config must be None or a dictionary .* got int 1024", lambda: IntegratedCMRModel(None, 1024, model=llama)),
        (TypeError, "memory_config must be None or a dictionary .* got int 0", lambda: IntegratedCMRModel(None, 0, model=llama)),
        (TypeError, "config must be None or a dictionary .* got int 48", lambda: IntegratedCMRModel(48, None, model=llama)),
        (ValueError, "logit_cache must be an int of 0 or more, got True", lambda: IntegratedCMRModel(None, {"logit_cache": True}, model=llama)),
        (ValueError, "state_dtype must be one of float32, float16, int8, got 'fp8'", lambda: IntegratedCMRModel(None, {"state_dtype": "fp8"}, model=llama)),
        (ValueError, "spill must be None or the name of a folder, got True", lambda: IntegratedCMRModel(None, {"spill": True}, model=llama)),
        (ValueError, r"has memories already; call remove_memory_hooks\(\)", lambda: IntegratedCMRModel(None, {"target_layers": [0]}, model=llama)),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert model.memory_buffer.version == before and model.engine.next_sequence == number and model.memory_enabled
    again = CMRTransformer(None, ALL, model=llama)
    with pytest.raises(ValueError, match="has memories already"):
        again.register_memory_hooks()
    model.remove_memory_hooks()
    again.register_memory_hooks()
