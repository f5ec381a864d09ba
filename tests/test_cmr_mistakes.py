"""Everyday mistakes: each is named, with what is allowed, and nothing has changed."""

import json
import re

import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file

from ai_sleep_constructs.cmr.buffer import LayeredMemoryBuffer
from ai_sleep_constructs.cmr.engine import MemoryEngine
from ai_sleep_constructs.cmr.configuration import MemoryConfig
from ai_sleep_constructs.cmr.gate import LearnedGate
from ai_sleep_constructs.cmr.layers import key_fields, memory_layers
from ai_sleep_constructs.cmr.logit_cache import LogitCache, Whitening
from ai_sleep_constructs.cmr.recall import BufferRecall
from ai_sleep_constructs.cmr.streaming import MemoryStream
from ai_sleep_constructs.cmr.views import Draws

STATE, SLOTS = torch.zeros(8), torch.zeros(2, dtype=torch.int64)


def filled():
    buffer = LayeredMemoryBuffer(20, 20)
    g = torch.Generator().manual_seed(0)
    buffer.store_states(torch.randn(10, 8, generator=g), 0, torch.arange(10), torch.rand(10, generator=g), 3)
    return buffer


@pytest.mark.parametrize(("method", "arguments", "error", "message"), [
    ("cleanup_least_relevant", [-1], ValueError, "share must be a number in [0, 1], got -1"),
    ("cleanup_least_relevant", [True], ValueError, "share must be a number in [0, 1], got True"),
    ("cleanup_least_relevant", ["half"], ValueError, "share must be a number in [0, 1], got 'half'"),
    ("retrieve_by_layer", [0, -1], ValueError, "k must be an int of 1 or more or None, got -1"),
    ("retrieve_by_layer", [0, 0], ValueError, "k must be an int of 1 or more or None, got 0"),
    ("retrieve_by_layer", [0, 2.0], ValueError, "k must be an int of 1 or more or None, got 2.0"),
    ("retrieve_by_layer", [0, 2, "much"], ValueError, "min_relevance must be a number, got 'much'"),
    ("retrieve_by_layer", ["0"], ValueError, "layer_idx must be an int, got '0'"),
    ("retrieve_top_k_relevant", [0], ValueError, "k must be an int of 1 or more, got 0"),
    ("retrieve_top_k_relevant", [True], ValueError, "k must be an int of 1 or more, got True"),
    ("retrieve_top_k_relevant", [2, "0"], ValueError, "layer_indices must be ints, got '0'"),
    ("retrieve_by_sequence", ["3"], ValueError, "sequence_id must be an int, got '3'"),
    ("clear_sequence", ["3"], ValueError, "sequence_id must be an int, got '3'"),
    ("consolidate", [0], ValueError, "budget must be an int of 1 or more, got 0"),
    ("entry", [0, 10], ValueError, "slot must be one of slots(0), got 10"),
    ("entry", [1, 0], ValueError, "slot must be one of slots(1), got 0"),
    ("gather", [1, SLOTS], ValueError, "layer_idx must be a layer with memories, one of [0], got 1"),
    ("gather", [0, [0, 1]], TypeError, "slots must be a tensor, got list: [0, 1]"),
    ("gather", [0, torch.zeros(2)], ValueError, "slots must be int64, got torch.float32"),
    ("touch", [0, "all"], TypeError, "slots must be a tensor, got str: 'all'"),
    ("neighbourhood", [0, SLOTS, -1], ValueError, "before must be an int of 0 or more, got -1"),
    ("search", ["def", 0, 3], TypeError, "queries must be a tensor, got str: 'def'"),
    ("search", [STATE[None], "0", 3], ValueError, "layer_idx must be an int, got '0'"),
    ("search", [STATE[None], 0, 3.0], ValueError, "k must be an int of 1 or more, got 3.0"),
    ("store_state", [[0.0] * 8, 0, 1, 0.5], TypeError, "hidden_state must be a tensor, got list"),
    ("store_state", [STATE, 0, "1", 0.5], ValueError, "position_idx must be an int, got '1'"),
    ("store_state", [STATE, 0, 1, "0.5"], ValueError, "relevance_score must be a number in [0, 1], got '0.5'"),
    ("store_states", ["x", 0, SLOTS, torch.zeros(2)], TypeError, "hidden_states must be a tensor, got str: 'x'"),
    ("store_states", [torch.zeros(2, 8), 0, "ab", torch.zeros(2)], TypeError, "position_idx must be a tensor, got str: 'ab'"),
    ("count", ["0"], ValueError, "layer_idx must be an int or None, got '0'"),
])
def test_mistakes_with_a_buffer(method, arguments, error, message):
    buffer = filled()
    before, version, statistics = buffer._held()[0], buffer.version, dict(buffer.statistics)
    with pytest.raises(error, match=re.escape(message)):
        getattr(buffer, method)(*arguments)
    assert all(torch.equal(column, before[name]) for name, column in buffer._held()[0].items())
    assert buffer.version == version and buffer.statistics == statistics


@pytest.mark.parametrize(("method", "arguments", "error", "message"), [
    ("remember", ["x", SLOTS, SLOTS], TypeError, "states must be a tensor, got str"),
    ("remember", [torch.zeros(2, 9), SLOTS, SLOTS], ValueError, "states must be floats of shape [tokens, 8], got torch.float32 [2, 9]"),
    ("remember", [torch.zeros(2, 8), [1, 2], SLOTS], TypeError, "followers must be a tensor, got list"),
    ("remember", [torch.zeros(2, 8), SLOTS, [0, 1]], TypeError, "position_idx must be a tensor, got list"),
    ("remember", [torch.zeros(2, 8), SLOTS, SLOTS, None, 0, torch.zeros(2, 3)], ValueError, "contexts must be integers of shape [2, 8]"),
    ("votes", [torch.zeros(2, 9)], ValueError, "states must be floats of shape [tokens, 8], got torch.float32 [2, 9]"),
    ("votes", [torch.zeros(2, 8), SLOTS[:1]], ValueError, "ids must be integers of shape [2]"),
    ("mix", [torch.zeros(3, 50), torch.zeros(2, 8)], ValueError, "logits must have shape [2, vocabulary], got [3, 50]"),
    ("mix", [[1.0], torch.zeros(2, 8)], TypeError, "logits must be a tensor, got list"),
])
def test_mistakes_with_a_logit_cache(method, arguments, error, message):
    cache = LogitCache(8, 10)
    with pytest.raises(error, match=re.escape(message)):
        getattr(cache, method)(*arguments)
    assert cache.buffer.count() == 0


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"size": 0}, ValueError, "size must be an int of 1 or more, got 0"), ({"memories": -1}, ValueError, "memories must be an int of 1 or more, got -1"),
    ({"gate": 0.5}, TypeError, "gate must be a function"), ({"whitening": Whitening(9)}, ValueError, "whitening must be for states of size 8, got one for 9"),
])
def test_a_logit_cache_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        LogitCache(**{"size": 8, **options})


@torch.no_grad()
def test_a_cache_of_another_width_is_named_where_it_is_used():
    torch.manual_seed(0)
    model = FAMILIES["llama"]().eval()
    with (
        MemoryStream(model, window=16, chunk=8, cache=LogitCache(32)) as stream,
        pytest.raises(ValueError, match=r"states must be floats of shape \[tokens, 32\], got torch.float32 \[8, 48\]"),
    ):
        stream.read(torch.arange(1, 20))
    engine = MemoryEngine(model, MemoryConfig(target_layers=[1], logit_cache=10))
    engine.cache = LogitCache(32)
    engine.attach()
    with pytest.raises(ValueError, match=r"states must be floats of shape \[tokens, 32\]"):
        model(input_ids=torch.arange(1, 20)[None])
    engine.detach()


def test_a_file_that_is_no_gate(tmp_path):
    path = tmp_path / "gate.safetensors"
    for content in (b"", b"garbage, and more of it than a header", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="path: .*gate.safetensors is no file of a gate"):
            LearnedGate.load(path)
    for metadata in ({}, {"gate": "not json"}, {"gate": "[]"}, {"gate": '{"kind": "LearnedGate"}'}):
        save_file({"x": torch.zeros(1)}, path, metadata)
        with pytest.raises(ValueError, match="path: .*gate.safetensors is no file of a gate"):
            LearnedGate.load(path)
    LearnedGate(8).save(path)
    record = path.read_bytes().replace(b'hidden\\": 8', b'hidden\\": 9')
    path.write_bytes(record)
    with pytest.raises(ValueError, match="is no file of a gate, or a damaged one"):
        LearnedGate.load(path)
    with pytest.raises(OSError):
        LearnedGate.load(tmp_path / "none")


@torch.no_grad()
def test_views_of_what_is_closed_or_was_not_read():
    from ai_sleep_constructs.cmr.tensor_buffer import TensorBuffer

    torch.manual_seed(0)
    model = FAMILIES["llama"]().eval()
    recall = BufferRecall(TensorBuffer(100, 100, "fifo", fields=key_fields(memory_layers(model)[0])), budget=10, places="clamped")
    with MemoryStream(model, window=16, chunk=8, recall=recall, layers=[1]) as stream:
        with Draws(stream.weaver, recall) as draws:
            stream.read(torch.arange(1, 60))
        for wrong, message in [
            ({"length": 0}, "length must be an int of 1 or more, got 0"), ({"length": 9, "layer": 2}, "layer must be one of .*[1].*, got 2"),
            ({"length": 9, "token": 99}, "token must be an int in"), ({"length": 9, "token": 1.5}, "token must be an int in"),
            ({"length": 9, "sequence": "0"}, "sequence must be an int"),
        ]:
            with pytest.raises(ValueError, match=message):
                draws.weights(**wrong)
        assert float(draws.weights(40).sum()) > 0
        with pytest.raises(TypeError, match="ids must be a tensor, got str"):
            draws.html(None, "text")
    with pytest.raises(RuntimeError, match="weaver: it was removed"), Draws(stream.weaver, recall):
        pass
    with pytest.raises(TypeError, match="weaver must be the Reweaver of a stream or an engine with its hooks on, got None"):
        Draws(None, recall)


def test_many_entries_are_what_they_are_one_by_one():
    buffer = filled()
    buffer.store_states(torch.randn(9, 8), 1, torch.arange(9), torch.linspace(0, 1, 9), 4)
    buffer.clear_sequence(7)
    buffer.touch(0, torch.tensor([2, 2, 5]))
    everything = buffer.get_all_entries()
    assert [(e.layer_idx, e.position_idx) for e in everything] == [(0, i) for i in range(10)] + [(1, i) for i in range(9)]
    for entry in everything:
        one = buffer.entry(entry.layer_idx, entry.position_idx)
        assert torch.equal(one.hidden_state, entry.hidden_state) and vars(one).keys() == vars(entry).keys()
        assert all(getattr(one, name) == value for name, value in vars(entry).items() if name != "hidden_state")
    assert [e.access_count for e in everything[:10]] == [0, 0, 2, 0, 0, 1, 0, 0, 0, 0]
    best = buffer.retrieve_top_k_relevant(5)
    assert [e.relevance_score for e in best] == sorted((e.relevance_score for e in everything), reverse=True)[:5]
    everything[0].hidden_state.zero_()
    assert float(buffer.entry(0, 0).hidden_state.abs().sum()) > 0
    assert [e.access_count for e in buffer.retrieve_by_sequence(4)] == [1] * 9


@pytest.mark.parametrize(("experiment", "parameters", "message"), [
    ("cmr_cost", {"memories": -1}, "memories must be an int of 1 or more, got -1"),
    ("cmr_cost", {"layers": "3,9"}, r"layers must be ints in -6..5, got 9"),
    ("cmr_cost", {"searched": "many"}, "searched must be whole numbers with commas between, got 'many'"),
    ("cmr_recall", {"model": "reference-gpt2"}, "layers must be ints in -4..3, got 4"),
    ("cmr_recall", {"memories": 0}, "memories must be an int of 1 or more, got 0"),
])
def test_parameters_of_experiments_are_checked_first(experiment, parameters, message, tmp_path):
    from ai_sleep_constructs.workbench.experiments import find_experiment

    cells = [cell["source"] for cell in json.loads(find_experiment(experiment).path.read_text())["cells"] if cell["cell_type"] == "code"]
    names = {}
    for source in map("".join, cells):
        begins = "run = Run(" in source
        try:
            exec(source, names)
        except ValueError as error:
            assert begins and re.search(message, str(error)), error
            break
        assert not begins
        names |= parameters if "output" in names else {}
