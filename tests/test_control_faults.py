"""Nights in which something goes wrong, and what must still hold afterwards."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ai_sleep_constructs.reference.loading import load_model
from ai_sleep_constructs.sleep.controller import AISleepController
from ai_sleep_constructs.sleep.coordinator import SleepCoordinator
from ai_sleep_constructs.sleep.health import HealthBaseline
from ai_sleep_constructs.sleep.modes import OptimizationStrategy, SleepMode, SleepTrigger
from ai_sleep_constructs.sleep.report import read_journal
from ai_sleep_constructs.sleep.service import SleepService
from ai_sleep_constructs.sleep.strategies.adaptive_learning_rate import RateSnapshot, scale_rates
from ai_sleep_constructs.sleep.strategies.base import SleepContext, Strategy, run_transaction
from ai_sleep_constructs.sleep.trainer import SleepCallback

PRUNE, RATE, CACHE = (
    OptimizationStrategy.ATTENTION_HEAD_PRUNING, OptimizationStrategy.ADAPTIVE_LEARNING_RATE, OptimizationStrategy.KV_CACHE_MANAGEMENT,
)
MANUAL, LIGHT, DEEP = SleepTrigger.MANUAL, SleepMode.LIGHT_SLEEP, SleepMode.DEEP_SLEEP


def tiny() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )).eval()


def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


class Rows(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": ids(1, 16, index)[0], "labels": ids(1, 16, index)[0]}


def pruning(model: Any, optimizer: Any = None) -> AISleepController:
    controller = AISleepController("m")
    controller.bind(model, calibration=ids(4, 32), optimizer=optimizer)
    controller.configure_deep_sleep(strategies=[PRUNE], pruning_fraction=0.3)
    return controller


def test_a_bound_optimizer_trains_what_pruning_left() -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = pruning(model, optimizer)
    for _ in range(2):
        assert controller.initiate_sleep(MANUAL, DEEP), controller.last_refusal
        controller.wake_up()
    report = controller.reports[0]
    assert report.strategies[0].status == "committed" and report.replaced and type(report).from_dict(report.to_dict()).replaced == report.replaced
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in model.parameters())
    before = [layer.self_attn.q_proj.weight.detach().clone() for layer in model.model.layers]
    model.train()(input_ids=ids(2, 32), labels=ids(2, 32)).loss.backward()
    optimizer.step()
    assert all(not torch.equal(b, layer.self_attn.q_proj.weight) for b, layer in zip(before, model.model.layers, strict=True))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, per_device_train_batch_size=4, disable_tqdm=True, **options)


def test_a_training_with_factored_moments_survives_pruning(tmp_path: Path) -> None:
    model = tiny()
    callback = SleepCallback(pruning(model), deep_every=2)
    Trainer(model=model, args=arguments(tmp_path, max_steps=4, save_strategy="no", optim="adafactor"), train_dataset=Rows(), callbacks=[callback]).train()
    assert "fresh" in callback.nights[0].replaced.values()




def test_a_checkpoint_of_a_pruned_training_loads_and_resumes(tmp_path: Path) -> None:
    model = tiny()
    callback = SleepCallback(pruning(model), deep_every=2)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    Trainer(model=model, args=arguments(tmp_path, **options), train_dataset=Rows(), callbacks=[callback]).train()
    folder = tmp_path / "checkpoint-4"
    assert (folder / "pruned_heads.json").is_file() and callback.nights[0].replaced
    tokenizer = load_model("reference")[1]
    tokenizer.save_pretrained(folder)
    again = load_model(folder)[0]
    assert again.model.layers[0].self_attn.q_proj.weight.shape == model.model.layers[0].self_attn.q_proj.weight.shape
    torch.testing.assert_close(again(ids(1, 8)).logits, model.eval()(ids(1, 8)).logits)
    done = Trainer(model=again, args=arguments(tmp_path, **options | {"max_steps": 6}), train_dataset=Rows()).train(resume_from_checkpoint=str(folder))
    assert done.global_step == 6


def test_fp16_gradients_are_not_clipped_while_they_are_scaled(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_grad_norm=0.0)
    args.fp16 = True
    with pytest.raises(ValueError, match="max_grad_norm"):
        SleepCallback(pruning(tiny()), clip_mode="global").on_train_begin(args, None, None, model=tiny())


def test_the_rate_is_not_cut_twice_for_one_rise() -> None:
    optimizer = torch.optim.SGD((model := tiny()).parameters(), lr=1.0)
    controller = AISleepController("m")
    controller.bind(model, optimizer=optimizer, calibration=ids(2, 16))
    controller.configure_light_sleep(strategies=[RATE])
    for i in range(50):
        controller.model_state.record_metric("loss", 2.0 + 0.01 * i)
    statuses = []
    for _ in range(12):
        controller.initiate_sleep(MANUAL, LIGHT)
        controller.wake_up()
        statuses.append(controller.last_report.strategies[0].status)
        controller.model_state.record_metric("loss", 1.5)
    assert optimizer.param_groups[0]["lr"] == 0.5 and statuses[:8] == ["committed", *["skipped"] * 7] and statuses[8] == "committed"


def test_the_peaks_of_a_cycle_are_scaled_and_restored() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.1, max_lr=1.0, step_size_up=4, cycle_momentum=False)
    saved = RateSnapshot(optimizer, scheduler)
    scale_rates(optimizer, 0.5, scheduler)
    assert scheduler.max_lrs == [0.5] and scheduler.base_lrs == [0.05]
    saved.restore()
    assert scheduler.max_lrs == [1.0] and scheduler.base_lrs == [0.1]


class Unready(Strategy):
    name, modes = "unready_for_a_test", frozenset({LIGHT, DEEP})

    def ready(self, context: SleepContext) -> str:
        raise KeyError("boom")

    def snapshot(self, context: SleepContext) -> Any:
        raise AssertionError

    def apply(self, context: SleepContext) -> dict[str, Any]:
        raise AssertionError


def test_a_strategy_that_raises_before_it_begins_is_a_failed_one() -> None:
    controller = AISleepController("m")
    report = run_transaction(Unready(), SleepContext(controller.model_state, None, None, None, None))
    assert report.status == "failed" and "boom" in report.message


def test_a_night_that_breaks_off_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, told = AISleepController("m"), []
    controller.set_trigger_threshold(SleepTrigger.DRIFT_DETECTED, 1)
    controller.register_callback("on_sleep_end", lambda: told.append(controller.model_state.current_mode))
    controller.waking.alerts["drift_detected"] = 1

    def broken() -> None:
        raise OSError("no disk")

    monkeypatch.setattr(controller, "_execute_deep_sleep", broken)
    with pytest.raises(OSError, match="no disk"):
        controller.sleep_if_triggered()
    assert told == [SleepMode.AWAKE] and controller.check_triggers() is None, "the same alerts do not put it to sleep for ever"


def test_a_health_record_that_cannot_be_renewed_does_not_break_the_night(tmp_path: Path) -> None:
    controller = pruning(tiny())
    controller.rebind(health=HealthBaseline.of(controller.model_state.model))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("the backup is gone")

    controller.health.refresh = refuse
    assert controller.initiate_sleep(MANUAL, DEEP)
    assert controller.last_report.strategies[0].status == "committed" and "backup is gone" in controller.last_report.message
    assert controller.wake_up()


def test_the_journal_is_json_whatever_the_numbers(tmp_path: Path) -> None:
    controller = AISleepController("m", journal=tmp_path / "journal.jsonl")
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] = float("nan")
    controller.bind(model, calibration=ids(4, 32))
    controller.guard = None
    controller.configure_deep_sleep(strategies=[PRUNE])
    controller.initiate_sleep(MANUAL, DEEP)
    controller.last_report.strategies[0].bits_before = float("inf")
    from ai_sleep_constructs.sleep.report import append_journal

    append_journal(tmp_path / "journal.jsonl", controller.last_report)
    for line in (tmp_path / "journal.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert read_journal(tmp_path / "journal.jsonl")[-1]["strategies"][0]["bits_before"] is None


def test_the_end_of_a_night_does_not_resume_the_next_one() -> None:
    controller = AISleepController("m")
    controller.bind(tiny(), calibration=ids(2, 32))
    service = SleepService(controller, "queue", hash_parameters=False)
    resume, gaps, inside = service.resume, [], threading.Event()

    def slow() -> None:
        gaps.append(service._night is None)
        resume()

    service.resume = slow
    controller._execute_light_sleep = inside.set
    try:
        service.sleep(mode=LIGHT).result(10)
        deadline = time.monotonic() + 5
        while not gaps and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gaps == [False], "requests go on before another night may begin"
    finally:
        service.close()


def test_a_model_that_does_not_wake_does_not_count_as_serving() -> None:
    a, b = AISleepController("a"), AISleepController("b")
    a.transition_guards["mine"] = lambda step: "not yet" if step.target is SleepMode.AWAKE else ""
    coordinator = SleepCoordinator([a, b], min_awake=1)
    with pytest.raises(RuntimeError, match="did not wake up"):
        coordinator.request_sleep("a", mode=LIGHT).result(5)
    assert coordinator.serving() == ["b"]
    waiting = coordinator.request_sleep("b", mode=LIGHT)
    time.sleep(0.2)
    assert not waiting.done() and b.model_state.current_mode is SleepMode.AWAKE
    coordinator.close()
