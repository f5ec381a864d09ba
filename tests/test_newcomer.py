"""What a newcomer runs into: options that do not fit, strategies that could not run, models and controllers kept for later."""

import copy
from dataclasses import dataclass

import pytest
import torch

from ai_sleep_constructs import (
    AISleepController,
    HuggingFaceModelAdapter,
    OptimizationStrategy,
    SleepMode,
    load_corpus,
    load_model,
)
from ai_sleep_constructs.reference.architecture import attention_blocks
from ai_sleep_constructs.sleep.guard import GuardSet
from ai_sleep_constructs.sleep.head_surgery import prune_groups
from ai_sleep_constructs.sleep.snapshot import ModuleSnapshot
from ai_sleep_constructs.sleep.state import LMModelState
from ai_sleep_constructs.sleep.strategies.base import (
    SleepContext,
    Strategy,
    register,
    registered_strategies,
    run_transaction,
    unregister,
)


@pytest.fixture(scope="module")
def reference():
    return load_model("reference")



def test_adapter_keeps_the_configured_duration():
    adapter = HuggingFaceModelAdapter(None, "m")
    adapter.enable_sleep_cycles()
    adapter.controller.configure_light_sleep(duration=7)
    assert adapter.initiate_light_sleep() and adapter.controller.last_report.duration == 7
    assert adapter.wake_model() and adapter.initiate_deep_sleep() and adapter.controller.last_report.duration == 1800
    assert adapter.wake_model() and adapter.initiate_deep_sleep(9) and adapter.controller.last_report.duration == 9


def test_adapter_saves_a_pruned_model_and_goes_on_with_a_loaded_controller(reference, tmp_path):
    model, tokenizer = copy.deepcopy(reference.model), reference.tokenizer
    prune_groups(attention_blocks(model)[0], [1])
    adapter = HuggingFaceModelAdapter(model, "m", tokenizer=tokenizer, guard=None)
    adapter.controller.configure_light_sleep(duration=7)
    loaded = load_model(adapter.save(tmp_path / "model"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits)
    adapter.controller.save(tmp_path / "controller")
    controller = AISleepController.load(tmp_path / "controller")
    again = HuggingFaceModelAdapter(loaded.model, "m", tokenizer=tokenizer, controller=controller, guard=None)
    assert again.controller is controller and controller.light_sleep_config["duration"] == 7
    assert controller.model_state.model is loaded.model
    with pytest.raises(ValueError, match="'m'.*model_id='other'"):
        HuggingFaceModelAdapter(None, "other", controller=controller)
    with pytest.raises(TypeError, match="controller"):
        HuggingFaceModelAdapter(None, "m", controller=adapter)
    with pytest.raises(RuntimeError, match="no model"):
        HuggingFaceModelAdapter(None, "m").save(tmp_path / "nothing")
    adapter.enable_sleep_cycles()
    adapter.initiate_light_sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        adapter.save(tmp_path / "asleep")
    assert not (tmp_path / "asleep").exists()


def test_default_strategies_come_back_and_a_text_is_no_list():
    controller = AISleepController("m")
    controller.configure_light_sleep(strategies=[])
    controller.configure_light_sleep(duration=5)
    assert controller.light_sleep_config["strategies"] == []
    controller.configure_light_sleep(strategies="default")
    assert controller.light_sleep_config["strategies"] is None
    for wrong in ("text", OptimizationStrategy.KV_CACHE_MANAGEMENT, {OptimizationStrategy.KV_CACHE_MANAGEMENT}):
        with pytest.raises(TypeError, match="strategies must be a list"):
            controller.configure_light_sleep(strategies=wrong)
    with pytest.raises(ValueError, match="did you mean 'kv_cache_management'"):
        controller.configure_light_sleep(strategies=["kv_cache"])


@pytest.mark.parametrize(
    "options",
    [
        {"rehearsal_strength": "x"},
        {"rehearsal_strength": float("nan")},
        {"rehearsal_method": "weight_average", "rehearsal_strength": 2},
        {"rehearsal_seed": 1.5},
        {"recalibration_rate": "x"},
        {"recalibration_memory": None},
        {"recalibration_teacher": 3},
    ],
)
def test_options_are_checked_when_given_also_of_strategies_that_do_not_run(options):
    controller = AISleepController("m")
    controller.configure_deep_sleep(strategies=[OptimizationStrategy.SECURITY_PATCHING])
    before = dict(controller.deep_sleep_config)
    with pytest.raises(ValueError, match=list(options)[-1]):
        controller.configure_deep_sleep(**options)
    assert controller.deep_sleep_config == before


def test_one_token_is_no_retention():
    with pytest.raises(ValueError, match="a share .* or a number of tokens"):
        AISleepController("m").configure_light_sleep(kv_cache_retention=1)


def test_an_option_of_the_other_mode_says_where_it_belongs():
    with pytest.warns(UserWarning, match="it belongs to attention_head_pruning, which works in deep_sleep") as caught:
        AISleepController("m").configure_light_sleep(pruning_fraction=0.1)
    assert caught[0].filename == __file__


def test_registering_something_that_could_not_run_is_refused():
    def made(decorate=True, **attributes):
        body = {"snapshot": lambda self, context: None, "apply": lambda self, context: {}, **attributes}
        cls = type("Made", (Strategy,), body)
        return dataclass(cls) if decorate else cls

    light = frozenset({SleepMode.LIGHT_SLEEP})
    for wrong, match in [
        (made(name="made"), "modes"),
        (made(name="made", modes={"light_sleep"}), "modes"),
        (made(name="made", modes=frozenset()), "modes"),
        (made(name="made", modes={SleepMode.AWAKE}), "modes"),
        (made(modes=light), "name"),
        (made(name="made", modes=light, decorate=False), "dataclass"),
        (dataclass(type("Made", (Strategy,), {"name": "made", "modes": light})), "apply, snapshot"),
        ("made", "class"),
    ]:
        with pytest.raises(TypeError, match=match):
            register(wrong)
    fine = register(made(name="made", modes=light))
    assert fine in registered_strategies(SleepMode.LIGHT_SLEEP)
    unregister("made")
    assert fine not in registered_strategies()
    with pytest.raises(ValueError, match="unknown strategy 'made'"):
        unregister("made")


def test_a_snapshot_that_does_not_hold_the_change_is_found_out(reference):
    model = copy.deepcopy(reference.model)

    @dataclass
    class Careless(Strategy):
        name, modes = "careless", frozenset({SleepMode.DEEP_SLEEP})

        def snapshot(self, context):
            return ModuleSnapshot([context.model.model.layers[0]])

        def apply(self, context):
            with torch.no_grad():
                context.model.model.layers[1].mlp.down_proj.weight.mul_(-20)
            return {}

    guard = GuardSet.of_texts(reference.tokenizer, load_corpus("python", "guard", max_bytes=20_000).texts, sequences=2, length=64)
    report = run_transaction(Careless(), SleepContext(LMModelState("m"), model, guard=guard))
    assert report.status == "failed" and "the snapshot did not hold all" in report.message
