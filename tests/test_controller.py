"""The controller around the nights: what it refuses, and that it can be saved and come back."""

import json
import math
from pathlib import Path

import pytest
import torch
from ai_sleep_constructs.sleep.archive import write_archive
from ai_sleep_constructs.sleep.controller import AISleepController
from ai_sleep_constructs.sleep.modes import OptimizationStrategy, SleepMode, SleepTrigger
from ai_sleep_constructs.sleep.session import Session
from ai_sleep_constructs.sleep.strategies.kv_cache import KVCacheManagement
from ai_sleep_constructs.sleep.transition_guards import PrerequisiteGuard, ResourceGuard
from transformers import LlamaConfig, LlamaForCausalLM


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )).eval()


@pytest.fixture
def bound() -> AISleepController:
    "A controller of a small model that has served something; every change is kept unmeasured."
    model = llama()
    session = Session(model)
    session.score(torch.arange(40) % 64)
    with pytest.warns(UserWarning, match="no guard set"):
        controller = AISleepController("small").bind(model, session=session, calibration=torch.randint(0, 64, (4, 16)))
    controller.configure_light_sleep(strategies=[KVCacheManagement], kv_cache_retention=0.5)
    controller.configure_deep_sleep(strategies=["attention_head_pruning"], pruning_fraction=0.5)
    return controller


# transition guards


def test_a_callback_cannot_wake_the_model_in_the_middle_of_a_night(bound: AISleepController) -> None:
    answers: list[object] = []
    bound.register_callback("on_optimization_complete", lambda _: answers.append(bound.wake_up()))
    bound.register_callback("on_optimization_complete", lambda _: answers.append(bound.initiate_sleep(SleepTrigger.SCHEDULED)))
    bound.register_callback("on_optimization_complete", lambda _: answers.append(bound.last_refusal))
    assert bound.initiate_sleep(SleepTrigger.MANUAL)
    assert answers[:2] == [False, False] and "still at work" in str(answers[2])
    assert bound.model_state.current_mode is SleepMode.LIGHT_SLEEP and bound.total_sleep_cycles == 1
    assert bound.wake_up()


def test_a_night_with_the_wrong_optimizer_is_refused_before_anything_happens(bound: AISleepController) -> None:
    called: list[object] = []
    bound.register_callback("on_sleep_start", lambda *_: called.append(1))
    bound.rebind(optimizer=torch.optim.SGD(llama(1).parameters(), lr=0.1))
    assert not bound.initiate_sleep(SleepTrigger.SCHEDULED)
    assert "safety" in bound.last_refusal and "tensors that the model does not have" in bound.last_refusal
    assert not called and not bound.reports and bound.model_state.current_mode is SleepMode.AWAKE
    bound.rebind(optimizer=torch.optim.SGD(bound.model_state.model.parameters(), lr=0.1))
    assert bound.initiate_sleep(SleepTrigger.SCHEDULED) and not bound.last_refusal


def test_an_optimizer_that_was_left_behind_is_noticed(bound: AISleepController) -> None:
    model = bound.model_state.model
    bound.rebind(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert bound.initiate_sleep(SleepTrigger.SCHEDULED) and bound.wake_up()
    assert bound.last_report.strategies[0].status == "committed" and bound.last_report.replaced, "a night takes it along"
    assert bound.initiate_sleep(SleepTrigger.SCHEDULED) and bound.wake_up(), bound.last_refusal
    norm = next(module for module in model.modules() if hasattr(module, "weight") and module.weight.ndim == 1)
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone())
    assert not bound.initiate_sleep(SleepTrigger.SCHEDULED) and "safety" in bound.last_refusal, "somebody else does not"


def test_prerequisites_hold_up_triggers_and_not_people(bound: AISleepController) -> None:
    bound.transition_guards["prerequisites"] = PrerequisiteGuard(min_samples=5)
    for _ in range(4):
        bound.performance_monitor.track_metric("loss", 1.0)
    assert not bound.initiate_sleep(SleepTrigger.DRIFT_DETECTED) and "4 values" in bound.last_refusal
    assert bound.initiate_sleep(SleepTrigger.MANUAL) and bound.wake_up()
    for _ in range(5):
        bound.performance_monitor.track_metric("loss", 1.0)
    assert bound.initiate_sleep(SleepTrigger.DRIFT_DETECTED)


def test_a_deep_night_that_does_not_fit_into_memory_is_not_begun(bound: AISleepController) -> None:
    bound.transition_guards["resources"] = ResourceGuard(copies=1e12)
    assert not bound.initiate_sleep(SleepTrigger.SCHEDULED) and "MiB are free" in bound.last_refusal
    assert bound.initiate_sleep(SleepTrigger.MANUAL)


def test_any_function_can_be_a_guard(bound: AISleepController) -> None:
    bound.transition_guards["sunday"] = lambda step: "not on Sundays" if step.target is SleepMode.DEEP_SLEEP else ""
    assert not bound.initiate_sleep(SleepTrigger.SCHEDULED) and bound.last_refusal == "sunday: not on Sundays"


@pytest.mark.parametrize("value", [-1, math.inf, "x", True])
def test_bad_limits_of_guards_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="min_samples must be a finite number"):
        PrerequisiteGuard(min_samples=value)
    with pytest.raises(ValueError, match="copies must be a finite number"):
        ResourceGuard(copies=value)


def test_a_start_callback_that_raises_leaves_the_model_awake_and_says_so(bound: AISleepController) -> None:
    def refuse(mode: SleepMode, trigger: SleepTrigger) -> None:
        raise RuntimeError("the pager is on")

    bound.register_callback("on_sleep_start", refuse)
    assert not bound.initiate_sleep(SleepTrigger.MANUAL)
    assert "the pager is on" in bound.last_refusal and bound.model_state.current_mode is SleepMode.AWAKE


def test_light_sleep_counts_when_it_goes_on_into_deep_sleep(bound: AISleepController) -> None:
    bound.initiate_sleep(SleepTrigger.MANUAL, SleepMode.LIGHT_SLEEP)
    light = bound.last_report.seconds
    bound.initiate_sleep(SleepTrigger.MANUAL, SleepMode.DEEP_SLEEP)
    bound.wake_up()
    statistics = bound.get_sleep_statistics()
    assert statistics["total_light_sleep_time"] >= light > 0 < statistics["total_deep_sleep_time"]


def test_without_auto_adapt_the_learning_rate_stays(bound: AISleepController) -> None:
    bound.auto_adapt = False
    bound.configure_light_sleep(strategies=[OptimizationStrategy.ADAPTIVE_LEARNING_RATE])
    bound.initiate_sleep(SleepTrigger.MANUAL)
    (report,) = bound.last_report.strategies
    assert report.status == "skipped" and "auto_adapt" in report.message


# rebinding


def test_rebind_keeps_the_rest_and_the_record_of_pruned_heads(bound: AISleepController) -> None:
    bound.initiate_sleep(SleepTrigger.SCHEDULED)
    bound.wake_up()
    pruned, calibration = dict(bound.model_state.attention_heads), bound.calibration
    assert pruned
    other = llama(2)
    bound.rebind(model=other, session=Session(other))
    assert bound.model_state.model is other and bound.calibration is calibration
    assert bound.model_state.attention_heads == pruned and bound.waking.session is bound.session
    with pytest.raises(TypeError, match="unknown tokeniser"):
        bound.rebind(tokeniser=None)


# saving


def test_a_saved_controller_comes_back_as_it_was(bound: AISleepController, tmp_path: Path) -> None:
    bound.rebind(optimizer=torch.optim.SGD(bound.model_state.model.parameters(), lr=0.03))
    bound.set_trigger_threshold(SleepTrigger.MEMORY_PRESSURE, 0.9)
    bound.initiate_sleep(SleepTrigger.MANUAL)
    bound.initiate_sleep(SleepTrigger.SCHEDULED)
    bound.wake_up()
    bound.security_patches_applied = 3
    bound.save(tmp_path / "night.controller")
    again = AISleepController.load(tmp_path / "night.controller")
    assert again.learning_rate == 0.03 and again.security_patches_applied == 3 and again.total_sleep_cycles == 2
    assert again.light_sleep_config == {**bound.light_sleep_config, "strategies": ["kv_cache_management"]}
    assert again.deep_sleep_config == bound.deep_sleep_config and again.trigger_thresholds == bound.trigger_thresholds
    assert [r.to_dict() for r in again.reports] == [r.to_dict() for r in bound.reports]
    assert again.model_state.attention_heads == bound.model_state.attention_heads
    assert [s.sleep_mode for s in again.model_state.state_history] == [s.sleep_mode for s in bound.model_state.state_history]
    before, after = bound.get_sleep_statistics(), again.get_sleep_statistics()
    assert after["total_light_sleep_time"] == before["total_light_sleep_time"]
    assert {k: before[k] for k in ("last_sleep", "current_mode")} == {k: after[k] for k in ("last_sleep", "current_mode")}
    json.dumps([r.to_dict() for r in again.reports])
    assert again.initiate_sleep(SleepTrigger.MANUAL) and again.last_report.cycle == 3


def test_a_file_of_something_else_is_refused(bound: AISleepController, tmp_path: Path) -> None:
    bound.model_state.save_state(tmp_path / "state")
    with pytest.raises(ValueError, match="must come from export_state"):
        AISleepController.load(tmp_path / "state")
    (tmp_path / "torn").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match="damaged"):
        AISleepController.load(tmp_path / "torn")
    with pytest.raises(OSError):
        AISleepController.load(tmp_path / "nowhere")


def test_a_strategy_that_is_not_registered_here_is_named(bound: AISleepController, tmp_path: Path) -> None:
    record = bound.export_state()
    record["deep_sleep_config"]["strategies"] = ["dream_journal"]
    write_archive(tmp_path / "other", record)
    with pytest.raises(ValueError, match="dream_journal"):
        AISleepController.load(tmp_path / "other")


def test_what_cannot_be_saved_leaves_the_old_file(bound: AISleepController, tmp_path: Path) -> None:
    path = tmp_path / "night.controller"
    bound.save(path)
    before = path.read_bytes()
    with pytest.warns(UserWarning, match="no strategy"):
        bound.configure_light_sleep(own_option=object())
    with pytest.raises(TypeError, match="own_option"):
        bound.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
