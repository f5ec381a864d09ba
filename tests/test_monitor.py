"""Alarms that come when something changed and not otherwise, and alerts that reach everybody once."""

import math
import threading
from typing import Any

import numpy as np
import pytest

from ai_sleep_constructs.sleep.alerts import AlertGate
from ai_sleep_constructs.sleep.anomalies import METHODS, AnomalyDetector
from ai_sleep_constructs.sleep.drift import DriftDetector, calibration, odds
from ai_sleep_constructs.sleep.monitor import LMPerformanceMonitor, PerformanceAlert
from ai_sleep_constructs.workbench.streams import changed, stable


def feed(detector: DriftDetector, values: Any) -> list[int]:
    return [i for i, value in enumerate(values) if detector.update(value)]


def delays(before: Any, after: Any, streams: int = 40) -> np.ndarray:
    """Samples from a change after 300 samples to the alarm, one per stream; inf where none came within 300."""
    found = []
    for seed in range(streams):
        rng, detector = np.random.default_rng(seed), DriftDetector(seed=seed)
        assert not feed(detector, before(rng, 300))
        alarms = feed(detector, after(rng, 300))
        found.append(alarms[0] + 1 if alarms else math.inf)
    return np.array(found)


def normal(mean: float = 0.0, sd: float = 1.0) -> Any:
    return lambda rng, size: rng.normal(mean, sd, size)


# drift


@pytest.mark.parametrize("name", ["normal", "lognormal", "standard_cauchy", "quantised"])
def test_few_false_alarms(name: str) -> None:
    """Measured: none, of 40 streams of 2,000 normal values and of 20 of 1,000 of the others. At 2,000 the bound is 1 %."""
    raised, streams, length = 0, *((40, 2000) if name == "normal" else (20, 1000))
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        values = rng.poisson(2.0, length) if name == "quantised" else getattr(rng, name)(size=length)
        raised += bool(feed(DriftDetector(seed=seed), values))
    assert raised <= 2


@pytest.mark.parametrize(("after", "median", "most"), [
    (normal(mean=1), 40, 90), (normal(mean=-1), 40, 90), (normal(mean=2), 14, 25), (normal(sd=2), 35, 90), (normal(sd=0.5), 60, 100),
])
def test_changes_are_found_soon(after: Any, median: int, most: int) -> None:
    found = delays(normal(), after)
    assert np.median(found) <= median and np.percentile(found, 95) <= most


def test_alpha_moves_the_alarm() -> None:
    strict, loose = [], []
    for seed in range(10):
        values = np.random.default_rng(seed).normal(size=500)
        values[200:] += 1
        strict += feed(DriftDetector(alpha=1e-3, seed=seed), values)
        loose += feed(DriftDetector(alpha=0.2, seed=seed), values)
    assert len(strict) == len(loose) == 10 and sum(strict) > sum(loose) + 50


def test_each_bet_is_fair() -> None:
    np.testing.assert_allclose(np.mean(odds(), axis=0), 1, atol=1e-9)


def test_protocol_of_the_drift_detector() -> None:
    detector, rng = DriftDetector(window_size=100), np.random.default_rng(0)
    with pytest.raises(RuntimeError, match="0 of 50"):
        detector.add_current_sample(0.0)
    for i in range(50):
        assert not detector.baseline_established, i
        detector.add_baseline_sample(rng.normal())
    assert detector.baseline_established and detector.detect_drift() == (False, 1.0)
    for _ in range(29):
        detector.add_current_sample(rng.normal(5))
        assert not detector.detect_drift()[0]
    assert detector.p_value < 1e-6, "known long before, but an alarm needs 30 samples"
    detector.add_current_sample(rng.normal(5))
    flag, p = detector.detect_drift()
    assert flag is True and type(p) is float and 0 < p < 1e-6
    for _ in range(200):
        detector.add_current_sample(rng.normal())
    assert detector.detect_drift()[0] and detector.drift_count == 1, "latched"
    detector.rebaseline(rng.normal(size=60))
    assert detector.detect_drift() == (False, 1.0) and detector.baseline_established


def test_a_second_change_is_found_after_the_new_baseline() -> None:
    rng = np.random.default_rng(3)
    detector = DriftDetector()
    alarms = feed(detector, np.concatenate([rng.normal(0, 1, 300), rng.normal(2, 1, 300), rng.normal(0, 1, 300)]))
    assert len(alarms) == 2 and 300 <= alarms[0] < 330 and 600 <= alarms[1] < 640 and detector.drift_count == 2


def test_same_seed_same_decisions_and_bounded_memory() -> None:
    values = np.random.default_rng(0).integers(0, 5, 1500).astype(float)
    first, second = DriftDetector(reference_limit=200, seed=4), DriftDetector(reference_limit=200, seed=4)
    feed(first, values)
    feed(second, values)
    assert first.p_value == second.p_value and len(first._reference) == len(first._history) == 200 and first.seen == 1500
    assert first._reference == sorted(first._reference)


@pytest.mark.parametrize("arguments", [{"window_size": 1}, {"window_size": 50.0}, {"alpha": 0.0}, {"alpha": 1.0}, {"horizon": 0}, {"reference_limit": 5}, {"season": 1}, {"season": 5000}])
def test_bad_drift_options(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        DriftDetector(**arguments)


# anomalies


@pytest.mark.parametrize("method", METHODS)
def test_anomalies_of_every_method(method: str) -> None:
    detector, rng = AnomalyDetector(method), np.random.default_rng(0)
    for i in range(10):
        assert detector.is_anomaly(1e9) == (False, 0.0), i
        detector.add_sample(rng.normal(10, 1))
    for value in rng.normal(10, 1, 90):
        detector.add_sample(value)
    before = list(detector.samples)
    flag, score = detector.is_anomaly(20.0)
    assert flag is True and type(score) is float and score > 3
    assert detector.is_anomaly(10.0)[0] is False and list(detector.samples) == before
    assert detector.is_anomaly(20.0) == (flag, score), "asking changes nothing"
    for value in rng.normal(10, 1, 500):
        detector.add_sample(value)
    assert len(detector.samples) == (10 if method == "adaptive" else 100) and len(detector.errors) <= 100


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [0.0, 1.0, -3e8, 1e-12])
def test_a_constant_stream(method: str, level: float) -> None:
    detector = AnomalyDetector(method)
    for _ in range(30):
        detector.add_sample(level)
    flag, score = detector.is_anomaly(level + max(abs(level) * 0.01, 1e-14))
    assert flag and math.isfinite(score)
    assert detector.is_anomaly(level) == (False, 0.0)
    assert not detector.is_anomaly(level * (1 + 1e-14))[0], "a rounding error is no anomaly"


def test_rates_of_the_methods_on_normal_values() -> None:
    """Of normal values 0.27 % lie beyond three standard deviations and 0.70 % outside Tukey's fences."""
    rates = {}
    for method in METHODS:
        detector, odd = AnomalyDetector(method), 0
        for value in np.random.default_rng(5).normal(size=3000):
            odd += detector.update(value)[0]
        rates[method] = odd / 3000
    assert 0.001 < rates["zscore"] < 0.006 and 0.005 < rates["iqr"] < 0.016 and 0.001 < rates["moving_avg"] < 0.006
    assert rates["adaptive"] <= 0.0025, "measured over 20 streams: 1.0 per 1,000"


def test_the_methods_differ() -> None:
    def verdicts(window: Any, value: float) -> list[bool]:
        found = []
        for method in METHODS[:3]:
            detector = AnomalyDetector(method)
            for sample in window:
                detector.add_sample(sample)
            found.append(detector.is_anomaly(value)[0])
        return found

    rng = np.random.default_rng(0)
    assert verdicts(np.arange(100.0) + rng.normal(0, 0.1, 100), 60.0) == [False, False, True]
    assert verdicts(np.concatenate([rng.normal(0, 1, 45), [40.0] * 8, rng.normal(0, 1, 45)]), 6.0) == [False, True, False]


@pytest.mark.parametrize(("arguments", "name"), [
    ({"method": "mad"}, "method"), ({"threshold": 0}, "threshold"), ({"threshold": math.nan}, "threshold"), ({"window_size": 9}, "window_size"),
])
def test_bad_anomaly_options(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        AnomalyDetector(**arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_detectors_refuse_what_is_not_finite(bad: float) -> None:
    drift, anomaly = DriftDetector(), AnomalyDetector()
    for call in (drift.add_baseline_sample, drift.update, anomaly.add_sample, anomaly.is_anomaly):
        with pytest.raises(ValueError, match="finite"):
            call(bad)
    assert drift.seen == 0 and not anomaly.samples


# the monitor


def test_seed_example() -> None:
    monitor = LMPerformanceMonitor(model_id="gpt-neo-125M")
    monitor.register_metric("perplexity", track_drift=True, track_anomalies=True, min_threshold=1.0, max_threshold=10.0)
    monitor.track_metric("perplexity", 3.5)
    monitor.track_metric("loss", 0.42)
    assert monitor.check_drift("perplexity") == (False, 1.0)
    assert monitor.get_metric_statistics("perplexity") == {"mean": 3.5, "median": 3.5, "std": 0.0, "min": 3.5, "max": 3.5, "count": 1, "latest": 3.5}
    assert monitor.get_recent_alerts(severity="high") == []
    assert monitor.metric_thresholds["loss"] == {"min": None, "max": None} and "loss" in monitor.drift_detectors


def test_one_breach_is_one_alert_and_one_callback() -> None:
    monitor, heard = LMPerformanceMonitor("m", cooldown=0), []
    monitor.register_metric("p", min_threshold=1.0, max_threshold=10.0)
    monitor.register_alert_callback(heard.append)
    for value in (5.0, 10.0, 1.0, 12.0, 0.9, 16.0, 0.4):
        monitor.track_metric("p", value)
    assert [(a.alert_type, a.severity, a.current_value, a.threshold_value) for a in heard] == [
        ("threshold_violation", "low", 12.0, 10.0), ("threshold_violation", "low", 0.9, 1.0),
        ("threshold_violation", "high", 16.0, 10.0), ("threshold_violation", "high", 0.4, 1.0),
    ]
    assert heard == monitor.alerts and all(isinstance(a, PerformanceAlert) and "p: " in a.message for a in heard)


def test_a_breach_that_is_an_anomaly_too_is_critical() -> None:
    monitor = LMPerformanceMonitor("m")
    monitor.register_metric("p", track_drift=False, max_threshold=10.0)
    for value in np.random.default_rng(0).normal(5, 0.5, 40).clip(4, 6):
        monitor.track_metric("p", value)
    monitor.clear_alerts()
    monitor.track_metric("p", 11.0)
    assert {a.alert_type: a.severity for a in monitor.alerts} == {"threshold_violation": "critical", "anomaly_detected": "critical"}


def test_a_value_is_not_in_its_own_window() -> None:
    monitor = LMPerformanceMonitor("m")
    for value in (*[1.0, 1.1] * 5, 50.0):
        monitor.track_metric("x", value)
    assert [(a.alert_type, a.severity, a.current_value) for a in monitor.alerts] == [("anomaly_detected", "medium", 50.0)]
    assert monitor.alerts[0].metadata["score"] > 100, "with 50 in the window no score could exceed 3.2"


def test_drift_is_one_high_alert_a_change_and_the_flag_goes_back() -> None:
    monitor, rng = LMPerformanceMonitor("m"), np.random.default_rng(1)
    monitor.register_metric("loss", track_anomalies=False)
    flags = []
    for value in np.concatenate([rng.normal(0, 1, 300), rng.normal(2, 1, 200), rng.normal(0, 1, 200)]):
        monitor.track_metric("loss", value)
        flags.append(monitor.check_drift("loss")[0])
    assert [(a.alert_type, a.severity) for a in monitor.alerts] == [("drift_detected", "high")] * 2
    assert monitor.drift_detectors["loss"].drift_count == 2 and monitor.alerts[0].metadata["p_value"] <= 0.05
    assert sum(flags) == 2 * 50 and not any(flags[:300]) and flags[-1] is False


def test_asking_changes_nothing() -> None:
    asked, quiet = LMPerformanceMonitor("m"), LMPerformanceMonitor("m")
    for value in np.random.default_rng(2).normal(size=400):
        asked.track_metric("x", value)
        quiet.track_metric("x", value)
        for _ in range(3):
            asked.check_drift("x")
        asked.get_monitoring_summary()
    assert asked.check_drift("x") == quiet.check_drift("x") and asked.drift_detectors["x"].seen == 400


def test_establish_baseline_takes_the_recent_values() -> None:
    monitor, rng = LMPerformanceMonitor("m", drift_window=60), np.random.default_rng(0)
    monitor.register_metric("x", track_anomalies=False)
    for value in np.concatenate([rng.normal(0, 1, 100), rng.normal(3, 1, 20)]):
        monitor.track_metric("x", value)
    assert monitor.check_drift("x")[0]
    monitor.establish_baseline("x")
    assert monitor.check_drift("x") == (False, 1.0) and monitor.drift_detectors["x"].seen == 60
    for value in rng.choice(list(monitor.metrics["x"])[-60:], 150):
        monitor.track_metric("x", value)
    assert monitor.drift_detectors["x"].drift_count == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_enters_nothing(bad: float) -> None:
    monitor = LMPerformanceMonitor("m")
    monitor.register_metric("x", min_threshold=0.0, max_threshold=10.0)
    for value in (1.0, bad, 3.0, bad):
        monitor.track_metric("x", value)
    assert [(a.alert_type, a.severity) for a in monitor.alerts] == [("non_finite", "high")], "the second is within the cooldown"
    assert monitor.non_finite_counts == {"x": 2} and list(monitor.metrics["x"]) == [1.0, 3.0]
    assert monitor.get_metric_statistics("x")["mean"] == 2.0 and monitor.drift_detectors["x"].seen == 2
    assert len(monitor.anomaly_detectors["x"].samples) == 2 and monitor.get_monitoring_summary()["total_samples"] == 4


def test_a_callback_that_raises_starves_nobody(caplog: pytest.LogCaptureFixture) -> None:
    monitor, heard = LMPerformanceMonitor("m"), []

    def broken(alert: PerformanceAlert) -> None:
        raise RuntimeError("no connection")

    for callback in (broken, heard.append, broken, heard.append):
        monitor.register_alert_callback(callback)
    monitor.track_metric("x", math.nan)
    assert len(heard) == 2 and monitor.callback_errors == 2 and "no connection" in caplog.text
    with pytest.raises(TypeError, match="callback"):
        monitor.register_alert_callback("print")  # type: ignore[arg-type]


def test_callbacks_run_outside_the_lock() -> None:
    monitor, answers = LMPerformanceMonitor("m"), []

    def ask(alert: PerformanceAlert) -> None:
        thread = threading.Thread(target=lambda: answers.append(monitor.get_metric_statistics("x")["count"]))
        thread.start()
        thread.join(timeout=5)
        monitor.track_metric("seen", 1.0)

    monitor.register_alert_callback(ask)
    monitor.track_metric("x", 1.0)
    monitor.track_metric("x", math.nan)
    assert answers == [1] and monitor.get_metric_statistics("seen")["count"] == 1


def test_threads_lose_nothing() -> None:
    monitor, heard = LMPerformanceMonitor("m", history_limit=100_000, cooldown=0), []
    monitor.register_alert_callback(heard.append)

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        for i in range(400):
            monitor.track_metric("shared", rng.normal())
            monitor.track_metric(f"own {number % 2}", math.nan if i % 100 == 0 else 1.0)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monitor.total_samples == 6 * 800 and len(monitor.metrics["shared"]) == 2400 == monitor.drift_detectors["shared"].seen
    assert monitor.total_alerts == len(heard) and sum(a.alert_type == "non_finite" for a in heard) == 24


def test_memory_is_bounded() -> None:
    monitor = LMPerformanceMonitor("m", history_limit=50, alert_limit=7, cooldown=0)
    for i in range(200):
        monitor.track_metric("x", math.nan if i % 2 else i)
    assert len(monitor.metrics["x"]) == 50 and len(monitor.alerts) == 7 and monitor.total_alerts >= 100
    assert monitor.get_metric_statistics("x")["latest"] == 198


def test_recent_alerts_are_filtered_and_cleared() -> None:
    monitor = LMPerformanceMonitor("m", cooldown=0)
    monitor.register_metric("x", track_drift=False, track_anomalies=False, max_threshold=1.0)
    for value in (1.2, 9.0, 0.5, 1.3, 0.5, 1.4):
        monitor.track_metric("x", value)
    assert [a.current_value for a in monitor.get_recent_alerts(count=2)] == [1.3, 1.4]
    assert [a.current_value for a in monitor.get_recent_alerts(severity="low")] == [1.2, 1.3, 1.4]
    assert [a.current_value for a in monitor.get_recent_alerts(severity="high")] == [9.0]
    for arguments in ({"severity": "urgent"}, {"count": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            monitor.get_recent_alerts(**arguments)  # type: ignore[arg-type]
    monitor.clear_alerts()
    assert monitor.get_recent_alerts() == [] and monitor.total_alerts == 4


def test_unknown_metrics_and_bad_values_are_named() -> None:
    monitor = LMPerformanceMonitor("m")
    monitor.track_metric("loss", 1.0)
    for call in (monitor.get_metric_statistics, monitor.check_drift, monitor.establish_baseline):
        with pytest.raises(KeyError, match=r"'los'.*'loss'"):
            call("los")
    with pytest.raises(TypeError, match=r"'loss'.*'high'"):
        monitor.track_metric("loss", "high")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="above max_threshold"):
        monitor.register_metric("loss", min_threshold=2, max_threshold=1)
    with pytest.raises(ValueError, match="min_threshold"):
        monitor.register_metric("loss", min_threshold=math.nan)
    assert monitor.metric_thresholds["loss"] == {"min": None, "max": None} and monitor.total_samples == 1
    monitor.register_metric("plain", track_drift=False, track_anomalies=False)
    assert monitor.check_drift("plain") == (False, 1.0) and monitor.get_metric_statistics("plain")["count"] == 0


@pytest.mark.parametrize("arguments", [
    {"cooldown": -1}, {"hysteresis": 1.0}, {"drift_window": 0}, {"anomaly_method": "magic"}, {"anomaly_threshold": -1}, {"history_limit": 0}, {"alert_limit": 1.5},
])
def test_bad_monitor_options(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments)).removeprefix("anomaly_").removeprefix("drift_")):
        LMPerformanceMonitor("m", **arguments)


def test_display_and_summary() -> None:
    monitor = LMPerformanceMonitor("m <b>")
    assert "0 samples" in monitor._repr_html_() and "0 samples" in repr(monitor)
    monitor.register_metric("empty")
    for value in range(30):
        monitor.track_metric("up", value)
    text = monitor._repr_html_()
    assert "m &lt;b&gt;" in text and text.count("<svg") == 1 and "<td>30</td>" in text
    summary = monitor.get_monitoring_summary()
    assert (summary["model_id"], summary["total_samples"], summary["metrics_tracked"]) == ("m <b>", 30, 2)
    assert monitor.get_metric_trend("up") == "increasing" and monitor.get_metric_trend("empty") == "unknown"
    assert len(monitor.to_frame("values")) == 30 and list(monitor.to_frame().index) == ["empty", "up"]
    with pytest.raises(ValueError, match="what"):
        monitor.to_frame("everything")


# autocorrelation, seasons, state


def resembling(rng: np.random.Generator, length: int, rho: float) -> np.ndarray:
    values = rng.normal(size=length)
    for i in range(1, length):
        values[i] = rho * values[i - 1] + math.sqrt(1 - rho**2) * values[i]
    return values


@pytest.mark.parametrize("rho", [0.7, 0.9])
def test_resemblance_is_no_drift(rho: float) -> None:
    """Measured over 200 streams of 10,000: .03 and .07. Without whitening every stream alarms."""
    raised = sum(bool(feed(DriftDetector(seed=n), resembling(np.random.default_rng(n), 2_500, rho))) for n in range(25))
    assert raised <= 5


def test_a_shift_of_a_resembling_stream_is_found() -> None:
    found = []
    for n in range(15):
        values = resembling(np.random.default_rng(n), 2_500, 0.7)
        values[2_000:] += 1
        detector = DriftDetector(seed=n)
        feed(detector, values[:2_000])
        found.append(next(iter(feed(detector, values[2_000:])), 500))
    assert (np.median(found) <= 170 and abs(detector.autocorrelation - 0.7) < 0.1) or detector.drift_count


@pytest.mark.parametrize("period", [7, 48])
def test_seasons_are_no_drift_and_shifts_in_them_are(period: int) -> None:
    raised, found = 0, []
    for n in range(8):
        rng = np.random.default_rng(n)
        wave = rng.normal(0, 4, period)[np.arange(2_400) % period] + rng.normal(size=2_400)
        detector = DriftDetector(season=period, seed=n)
        raised += bool(feed(detector, wave[:2_000]))
        found.append(next(iter(feed(detector, wave[2_000:] + 1.5)), 400))
    assert raised <= 1 and np.median(found) <= 40


@pytest.mark.parametrize(("offset", "scale"), [(1e6, 1.0), (0.0, 1e-9), (-1e12, 1e3), (0.0, 1e300)])
def test_offset_and_scale_do_not_matter(offset: float, scale: float) -> None:
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 400), np.random.default_rng(1).normal(2, 1, 100)])
    alarms = feed(DriftDetector(), values * scale + offset)
    assert alarms == feed(DriftDetector(), values) or (offset == -1e12 and len(alarms) == 1)
    assert 400 <= alarms[0] < 430


def test_a_constant_baseline_and_a_jump() -> None:
    detector = DriftDetector()
    assert not feed(detector, [3.0] * 500)
    alarms = feed(detector, [3.5] * 200)
    assert len(alarms) == 1 and alarms[0] < 40, "and the new level is soon the new baseline"


def test_ks_test_is_the_textbook_one() -> None:
    from scipy.stats import ks_2samp

    detector, values = DriftDetector(), np.random.default_rng(0).normal(size=400)
    assert all(map(math.isnan, detector.ks_test()))
    feed(detector, values)
    expected = ks_2samp(values[:100], values[-100:])
    assert detector.ks_test() == (float(expected.statistic), float(expected.pvalue))


@pytest.mark.parametrize("season", [None, 12])
@pytest.mark.parametrize("stop", [20, 70, 777, 1_630])
def test_a_restored_monitor_decides_the_same(season: int | None, stop: int, tmp_path: Any) -> None:
    rng = np.random.default_rng(4)
    values = resembling(rng, 2_700, 0.6) + np.sin(np.arange(2_700) * math.tau / 12)
    values[1_600:] += 4
    values[[333, 1_200]] = math.nan
    values[[900, 905, 1_900]] += 30
    monitor = LMPerformanceMonitor("m", anomaly_method="adaptive")
    for method in METHODS:
        monitor.anomaly_method = method
        monitor.register_metric(method, max_threshold=6.0, season=season)
    for value in values[:stop]:
        for name in METHODS:
            monitor.track_metric(name, value)
    again = LMPerformanceMonitor.load(monitor.save(tmp_path / "state.json"))
    assert again.state_dict() == monitor.state_dict() and [p.name for p in tmp_path.iterdir()] == ["state.json"]
    decisions = []
    for both in (monitor, again):
        heard: list[Any] = []
        both.register_alert_callback(lambda a, heard=heard: heard.append((a.alert_type, a.severity, a.metric_name, repr(a.current_value), repr(a.metadata))))
        for value in values[stop:stop + 1_000]:
            for name in METHODS:
                both.track_metric(name, value)
        decisions.append((heard, [both.check_drift(name) for name in METHODS]))
    assert decisions[0] == decisions[1] and decisions[0][0]


def test_a_file_that_holds_no_monitor(tmp_path: Any) -> None:
    for text in ("{", "[]", "{}", '{"version": 1}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=r"x\.json|version"):
            LMPerformanceMonitor.load(tmp_path / "x.json")


def test_the_shipped_calibration_keeps_its_promise() -> None:
    """The table is what `experiments/drift_calibration` measured with its full preset."""
    table = calibration()
    assert table["streams"] >= 500 and table["length"] == 10_000
    rates = table["false_alarms"]
    for kind, most in {"normal": 0.07, "t3": 0.07, "lognormal": 0.07, "ar0.7": 0.10, "ar0.9": 0.10}.items():
        assert rates[kind]["0.05"] <= most, kind


@pytest.mark.parametrize(("kind", "target"), [("normal", 0.07), ("lognormal", 0.07), ("ar0.7", 0.10), ("ar0.9", 0.10)])
def test_fresh_streams_agree_with_the_table_and_the_target(kind: str, target: float) -> None:
    """Streams that the table was not made from: no more alarms than chance allows at the shipped rate, and at the target."""
    from scipy.stats import binom

    streams, hits = 15, 0
    for number in range(10_000, 10_000 + streams):
        detector = DriftDetector(seed=number)
        hits += any(map(detector.update, stable(kind, number, 3_000).tolist()))
    for rate in (calibration()["false_alarms"][kind]["0.05"], target):
        assert hits <= binom.ppf(0.999, streams, rate)


@pytest.mark.parametrize(("kind", "change", "target"), [
    ("normal", "shift 1 sd", 35), ("normal", "shift 2 sd", 12), ("normal", "doubled sd", 25), ("ar0.7", "shift 1 sd", 140),
])
def test_delays_reach_the_targets(kind: str, change: str, target: int) -> None:
    """The median of 21 streams, with two standard errors of it (bootstrap)."""
    found = []
    for number in range(20_000, 20_021):
        detector = DriftDetector(seed=number)
        alarms = [i - 1_999 for i, value in enumerate(changed(kind, change, number).tolist()) if detector.update(value) and i >= 2_000]
        found.append(alarms[0] if alarms else math.inf)
    error = np.std([np.median(np.random.default_rng(i).choice(found, len(found))) for i in range(200)])
    assert np.median(found) <= target + 2 * error


# alerts


def test_cooldown_hysteresis_and_critical() -> None:
    monitor = LMPerformanceMonitor("m", cooldown=20)
    monitor.register_metric("p", track_drift=False, track_anomalies=False, max_threshold=10.0)
    for value in [9.0] * 5 + [11.0, 9.9, 11.0, 9.9] * 30:
        monitor.track_metric("p", value)
    assert len(monitor.alerts) == 1, "9.9 is within the margin: one breach, however long"
    for value in [9.0, 11.0] * 30:
        monitor.track_metric("p", value)
    assert 2 <= len(monitor.alerts) <= 5, "breaches that end and begin are told once a cooldown"
    before = len(monitor.alerts)
    monitor.track_metric("p", 99.0)
    assert len(monitor.alerts) == before + 1 and monitor.alerts[-1].severity == "high", "a higher severity always passes"
    monitor.track_metric("p", math.nan)
    assert monitor.alerts[-1].alert_type == "non_finite" and monitor.alerts[-1].severity == "critical", "a second kind within the cooldown"


def test_a_breach_that_began_silently_is_told_when_the_cooldown_is_over() -> None:
    gate, told = AlertGate(cooldown=10), []
    for sample, value in enumerate([11, 9, 9, *[11] * 20], 1):
        crossing = gate.crosses(value, None, 10.0)
        if crossing and gate.admit("threshold_violation", crossing[1], sample):
            gate.tell(crossing[1])
            told.append(sample)
    assert told == [1, 11]


def test_a_stream_of_nan_does_not_flap() -> None:
    monitor = LMPerformanceMonitor("m")
    for _ in range(1_000):
        monitor.track_metric("x", math.nan)
    assert len(monitor.alerts) == 10 and monitor.non_finite_counts["x"] == 1_000 and not monitor.metrics["x"]


def test_prometheus_text_is_readable_by_its_own_parser() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    from ai_sleep_constructs.sleep.monitor_views import prometheus_text

    monitor = LMPerformanceMonitor('a "quoted"\nname')
    for value in (1.0, math.nan, 3.0):
        monitor.track_metric("loss", value)
    text = prometheus_text(monitor, LMPerformanceMonitor("other"))
    found = {(s.name, s.labels["model"]): s.value for f in text_string_to_metric_families(text) for s in f.samples}
    assert found["ai_sleep_metric_latest", monitor.model_id] == 3.0 and found["ai_sleep_metric_non_finite_total", monitor.model_id] == 1.0
    assert found["ai_sleep_alerts_total", monitor.model_id] == 1.0 and found["ai_sleep_alerts_total", "other"] == 0.0
    assert text.count("# TYPE ai_sleep_metric_latest gauge") == 1
    with pytest.raises(ValueError, match="model_id"):
        prometheus_text(monitor, monitor)
