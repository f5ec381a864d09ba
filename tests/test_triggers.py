"""Each trigger through the controller: a state in which it fires, and one in which it must not."""

import time
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from ai_sleep_constructs.sleep import triggers
from ai_sleep_constructs.sleep.controller import AISleepController
from ai_sleep_constructs.sleep.modes import SleepTrigger
from ai_sleep_constructs.sleep.triggers import MEMORY, Waking


def watched(values: Any, trigger: SleepTrigger, threshold: Any, name: str = "loss") -> SleepTrigger | None:
    """What fires after a controller's monitor has seen `values`."""
    controller = AISleepController("m")
    controller.set_trigger_threshold(trigger, threshold)
    for value in values:
        controller.performance_monitor.track_metric(name, value)
    return controller.check_triggers()


def noise(seed: int, size: int, mean: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.1, size)


def test_drift() -> None:
    moved = np.concatenate([noise(0, 300), noise(1, 100, mean=2.3)])
    assert watched(moved, SleepTrigger.DRIFT_DETECTED, 1) is SleepTrigger.DRIFT_DETECTED
    assert watched(moved, SleepTrigger.DRIFT_DETECTED, 2) is None, "one change is one alert"
    for seed in range(5):
        assert watched(noise(seed, 600), SleepTrigger.DRIFT_DETECTED, 1) is None
        resembling = np.convolve(noise(seed, 640), np.ones(20) / 20, "valid")
        assert watched(resembling, SleepTrigger.DRIFT_DETECTED, 1) is None


def test_anomaly() -> None:
    hit = np.concatenate([noise(0, 200), [9.0] * 3, noise(1, 20)])
    assert watched(hit, SleepTrigger.ANOMALY_DETECTED, 1) is SleepTrigger.ANOMALY_DETECTED
    assert watched([2.0] * 500, SleepTrigger.ANOMALY_DETECTED, 1) is None
    assert AISleepController("m").performance_monitor.anomaly_method == "adaptive"
    false = sum(watched(noise(seed, 300), SleepTrigger.ANOMALY_DETECTED, 1) is not None for seed in range(20))
    assert false <= 11, "about one sample in a thousand is a false alarm, so about 6 of 20; with zscore 13 of 20"


def test_degradation() -> None:
    worse, same = [2.0] * 40 + [2.5] * 10, [2.0] * 40 + [2.1] * 10
    assert watched(worse, SleepTrigger.PERFORMANCE_DEGRADATION, 0.2) is SleepTrigger.PERFORMANCE_DEGRADATION
    assert watched(same, SleepTrigger.PERFORMANCE_DEGRADATION, 0.2) is None
    assert watched(worse, SleepTrigger.PERFORMANCE_DEGRADATION, 0.2, name="tokens_per_second") is None, "more of it is not worse"
    controller = AISleepController("m")
    controller.set_trigger_threshold(SleepTrigger.PERFORMANCE_DEGRADATION, 0.2)
    for value in worse:
        controller.performance_monitor.track_metric("loss", value)
    controller.waking = Waking(controller.performance_monitor)
    for value in range(50):
        controller.performance_monitor.track_metric("temperature", value)
    assert controller.check_triggers() is None, "the bad day is over, and other metrics do not bring it back"


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = psutil.Process().memory_info().rss
    for limits, fires in (({"process": resident / 2}, True), ({"process": resident * 16}, False), ({"machine": 1e-6}, True), ({"machine": 1.0}, False)):
        controller = AISleepController("m")
        controller.set_trigger_threshold(SleepTrigger.MEMORY_PRESSURE, limits)
        assert (controller.check_triggers() is SleepTrigger.MEMORY_PRESSURE) is fires, limits
    assert MEMORY["cuda"](None) >= 0 and (torch.cuda.is_available() or MEMORY["cuda"](None) == MEMORY["cuda_process"](None) == 0)
    monkeypatch.setattr(triggers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(triggers.torch.cuda, "mem_get_info", lambda index: [(60, 100), (15, 100)][index])
    monkeypatch.setattr(triggers.torch.cuda, "memory_reserved", lambda index: [3, 4][index])
    assert MEMORY["cuda"](None) == pytest.approx(0.85) and MEMORY["cuda_process"](None) == 7.0, "the fullest of the GPUs"
    controller = AISleepController("m")
    controller.set_trigger_threshold(SleepTrigger.MEMORY_PRESSURE, {"cuda": 0.8})
    assert controller.check_triggers() is SleepTrigger.MEMORY_PRESSURE
    controller.set_trigger_threshold(SleepTrigger.MEMORY_PRESSURE, {"cuda": 0.9})
    assert controller.check_triggers() is None


def test_idle() -> None:
    controller = AISleepController("m")
    controller.set_trigger_threshold(SleepTrigger.IDLE_TIMEOUT, 60)
    assert controller.check_triggers() is None
    controller.waking.active = time.monotonic() - 61
    assert controller.check_triggers() is SleepTrigger.IDLE_TIMEOUT
    controller.performance_monitor.track_metric("loss", 1.0)
    assert controller.check_triggers() is None, "a value that is tracked is activity"


@pytest.mark.parametrize(("threshold", "hours", "fires"), [
    (3600, 0.9, False), (3600, 1.1, True), ("0 3 * * *", 4.9, False), ("0 3 * * *", 5.1, True), ("0 3 * * 1", 30, True), ("0 3 * * 3", 30, False),
    ("*/15 * * * *", 0.2, False), ("*/15 * * * *", 0.3, True),
])
def test_schedule(threshold: Any, hours: float, fires: bool) -> None:
    """The model woke on Sunday, 1 March 2026, at 22:01."""
    controller, woke = AISleepController("m"), datetime(2026, 3, 1, 22, 1)
    controller.set_trigger_threshold(SleepTrigger.SCHEDULED, threshold)
    controller.waking = Waking(controller.performance_monitor, woke=time.monotonic() - hours * 3600, clock=lambda: woke + timedelta(hours=hours))
    assert (controller.check_triggers() is SleepTrigger.SCHEDULED) is fires


def test_no_threshold_no_sleep() -> None:
    controller = AISleepController("m")
    controller.waking = Waking(controller.performance_monitor, woke=-1e9, active=-1e9, alerts={"drift_detected": 9, "anomaly_detected": 9})
    assert controller.check_triggers() is None


@pytest.mark.parametrize(("trigger", "threshold"), [
    (SleepTrigger.SCHEDULED, "every night"), (SleepTrigger.SCHEDULED, "0 25 * * *"), (SleepTrigger.SCHEDULED, "0 0 30 2 *"), (SleepTrigger.SCHEDULED, 0), (SleepTrigger.DRIFT_DETECTED, "0 3 * * *"),
    (SleepTrigger.MEMORY_PRESSURE, {}), (SleepTrigger.MEMORY_PRESSURE, {"disk": 1}), (SleepTrigger.MEMORY_PRESSURE, {"machine": 1.5}),
    (SleepTrigger.MEMORY_PRESSURE, {"process": "1 GB"}), (SleepTrigger.IDLE_TIMEOUT, True), (SleepTrigger.MANUAL, 1),
])
def test_thresholds_that_mean_nothing(trigger: SleepTrigger, threshold: Any) -> None:
    controller = AISleepController("m")
    with pytest.raises(ValueError, match=trigger.value):
        controller.set_trigger_threshold(trigger, threshold)
    assert not controller.trigger_thresholds


def test_thresholds_and_monitor_survive_saving(tmp_path: Any) -> None:
    controller = AISleepController("m")
    controller.set_trigger_threshold(SleepTrigger.SCHEDULED, "0 3 * * *")
    controller.set_trigger_threshold(SleepTrigger.MEMORY_PRESSURE, {"process": 5e9, "machine": 0.9})
    values = np.concatenate([noise(0, 300), noise(1, 700, mean=2.3)])
    for value in values[:310]:
        controller.performance_monitor.track_metric("loss", value)
    controller.save(tmp_path / "controller.safetensors")
    again = AISleepController.load(tmp_path / "controller.safetensors")
    assert again.trigger_thresholds == controller.trigger_thresholds
    assert again.performance_monitor.state_dict() == controller.performance_monitor.state_dict()
    for both in (controller, again):
        both.set_trigger_threshold(SleepTrigger.DRIFT_DETECTED, 1)
    for value in values[310:]:
        for both in (controller, again):
            both.performance_monitor.track_metric("loss", value)
        assert controller.performance_monitor.check_drift("loss") == again.performance_monitor.check_drift("loss")
    assert controller.check_triggers() is again.check_triggers() is SleepTrigger.DRIFT_DETECTED
