"""A model that reads with memories sleeps: the night itself is no memory, and what was remembered is read with afterwards."""

import warnings

import pytest
import torch
from families import families

from ai_sleep_constructs.cmr import IntegratedCMRModel
from ai_sleep_constructs.cmr.layers import key_fields, memory_layers
from ai_sleep_constructs.cmr.recall import BufferRecall
from ai_sleep_constructs.cmr.reweaving import Reweaver
from ai_sleep_constructs.cmr.streaming import MemoryStream
from ai_sleep_constructs.cmr.tensor_buffer import TensorBuffer
from ai_sleep_constructs.sleep import AISleepController, SleepMode, SleepTrigger
from ai_sleep_constructs.sleep.adapter import HuggingFaceModelAdapter
from ai_sleep_constructs.sleep.guard import GuardSet
from ai_sleep_constructs.sleep.session import Session

FAMILIES = families(initializer_range=0.1)
MEMORY = {"target_layers": [1, 2], "relevance_threshold": 0.0, "places": "clamped", "distance": 30, "scoring_method": "variance_based"}


class Letters:
    """A tokenizer whose every token is one byte."""

    def batch_decode(self, ids, **options):
        return ["a" * len(row) for row in ids]


def text(rows, length, seed):
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["gpt2", "mistral", "qwen3"])
def model(request):
    torch.manual_seed(0)
    return IntegratedCMRModel(None, MEMORY, model=FAMILIES[request.param]().eval())


def controller(**strategies):
    made = AISleepController("m", enable_monitoring=False)
    options = {"max_regression": 1e9, "pruning_fraction": 0.34, "rehearsal_steps": 2, "rehearsal_tokens": 8,
               "recalibration_steps": 2, "rehearsal_max_forgetting": None}
    made.configure_deep_sleep(duration=100, **{**options, **strategies})
    return made


PARTS = {"guard": GuardSet(Letters(), text(2, 32, 5)), "calibration": text(4, 32, 6), "day": text(4, 32, 7)}


@pytest.mark.parametrize("how", ["model", "store", "adapter"])
def test_a_night_is_no_memory_and_the_model_reads_on_with_what_it_had(model, how):
    told, asked, inner = text(2, 40, 1), text(1, 20, 2), model.model
    with torch.no_grad():
        model(told)
    before = model.memory_buffer.get_all_entries()
    if how == "adapter":
        adapter = HuggingFaceModelAdapter(model, "m", controller=controller(), **PARTS)
        asleep = adapter.controller
        assert adapter.model is inner and adapter.session.model is inner
    else:
        parts = PARTS if how == "model" else {**PARTS, "stores": {"mine": model}}
        asleep = controller().bind(model if how == "model" else inner, **parts)
    assert asleep.initiate_sleep(SleepTrigger.MANUAL, SleepMode.DEEP_SLEEP), asleep.last_refusal
    done = {report.strategy: report for report in asleep.last_report.strategies}
    assert asleep.wake_up() and model.memory_enabled
    for name in ("attention_head_pruning", "semantic_consolidation", "layer_norm_recalibration"):
        assert done[name].status == "committed", (name, done[name].message)
    pruned = done["attention_head_pruning"].details["pruned"]
    assert {"layer_1", "layer_2"} & set(pruned)
    memories = done["semantic_consolidation"].details["memories"]["mine" if how == "store" else "memories"]
    assert memories["before"] == len(before) == 160 and len(model.memory_buffer) == memories["after"] == 80
    saved = model.memory_buffer.snapshot()
    with torch.no_grad():
        logits = model(asked).logits
        assert len(model.memory_buffer) == 80 + 40  # and it goes on remembering
        model.remove_memory_hooks()
        fresh = IntegratedCMRModel(None, MEMORY, model=inner)
        fresh.memory_buffer.restore(saved)
        fresh.engine.texts.next_sequence = model.engine.next_sequence - 1
        assert torch.equal(fresh(asked).logits, logits)
        fresh.remove_memory_hooks()
        assert not torch.equal(model(asked).logits, logits)


def test_memories_are_laid_aside_in_light_sleep_and_come_back_after_an_error(model):
    asleep, seen = controller().bind(model, **PARTS), []
    asleep.register_callback("on_optimization_complete", lambda name: seen.append(model.memory_enabled))
    assert asleep.initiate_sleep(SleepTrigger.MANUAL, SleepMode.LIGHT_SLEEP) and asleep.wake_up()
    assert seen and not any(seen) and model.memory_enabled and len(model.memory_buffer) == 0

    def interrupt(name):
        raise KeyboardInterrupt

    asleep.register_callback("on_optimization_complete", interrupt)
    with pytest.raises(KeyboardInterrupt):
        asleep.initiate_sleep(SleepTrigger.MANUAL, SleepMode.LIGHT_SLEEP)
    assert model.memory_enabled
    model.remove_memory_hooks()
    asleep = controller().bind(model, **PARTS)
    assert asleep.initiate_sleep(SleepTrigger.MANUAL, SleepMode.LIGHT_SLEEP) and asleep.wake_up()
    assert not model.memory_enabled  # it was off before


def test_memories_that_nobody_can_lay_aside_keep_the_model_awake(model):
    inner = model.model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asleep = controller().bind(inner, stores={"mine": model.memory_buffer})
    assert not asleep.initiate_sleep(SleepTrigger.MANUAL, SleepMode.DEEP_SLEEP)
    assert "reads with memories" in asleep.last_refusal and "bind the model with memories itself" in asleep.last_refusal
    asleep.rebind(stores={"mine": model})
    assert asleep.initiate_sleep(SleepTrigger.MANUAL, SleepMode.LIGHT_SLEEP) and asleep.wake_up()
    asleep.rebind(stores={})
    model.remove_memory_hooks()
    assert asleep.initiate_sleep(SleepTrigger.MANUAL, SleepMode.LIGHT_SLEEP) and asleep.wake_up()


def test_a_session_and_a_second_binding_take_the_model_with_memories(model):
    session = Session(model)
    assert session.model is model.model
    asleep = controller().bind(model, session=session, **PARTS)
    assert asleep.model_state.model is model.model and asleep.stores == {"memories": model}
    assert asleep.rebind(model=model).model_state.model is model.model and asleep.session is session
    session.score(text(1, 20, 3)[0])
    assert model.memory_buffer.count() == 40
    model.remove_memory_hooks()


@torch.no_grad()
def test_keys_of_memories_follow_the_layer(model):
    from ai_sleep_constructs.sleep.head_surgery import prune_groups

    model.remove_memory_hooks()
    inner, told, asked = model.model, text(1, 200, 1)[0], text(1, 60, 2)
    layers = memory_layers(inner)
    buffer = TensorBuffer(100, 200, fields=key_fields(layers[0]))

    def recall():
        return BufferRecall(buffer, budget=40, window=64, places="clamped", find="queries")

    with MemoryStream(inner, window=64, chunk=32, recall=recall(), layers=[1, 2]) as stream:
        stream.read(told)
    prune_groups(layers[1].block, [0])
    layers[2].norm.weight *= 1.5
    with Reweaver(inner, recall(), [1, 2]):
        inner(input_ids=asked)
    for layer in memory_layers(inner, [1, 2]):
        kept = buffer.gather(layer.index, buffer.slots(layer.index))
        assert torch.allclose(kept.fields["key"], layer.keys_values(kept.states)[0], atol=1e-6)
    assert buffer.layers[1]["field.key"].shape[1:] == (layers[1].block.groups - 1, 8)
    with MemoryStream(inner, window=64, chunk=32, recall=recall(), layers=[1, 2]) as stream:
        stream.read(told)
    assert buffer.count() == 200
    saved = buffer.layers[1]["field.key"].clone()
    assert buffer.layers[1].nbytes == sum(c.nbytes for c in buffer.layers[1].columns.values()) + 100 + 16 * 100
    assert saved.shape == (100, layers[1].block.groups - 1, 8)


@torch.no_grad()
def test_memories_of_another_model_are_refused(model):
    model.remove_memory_hooks()
    inner = model.model
    buffer = TensorBuffer(100, 200)
    buffer.store_states(torch.randn(5, 32), 1, torch.arange(5), torch.rand(5))
    with pytest.raises(ValueError, match="recall: its memories of layer 1 have 32 channels, the model has 48"):
        Reweaver(inner, BufferRecall(buffer), [1])
