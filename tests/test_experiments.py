"""The shipped experiments through the command line: what they leave behind, and that a seed repeats them exactly."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from ai_sleep_constructs.workbench.experiments import find_experiment
from ai_sleep_constructs.workbench.runs import find_finished

SHORT = {
    "batches": 3, "batch_tokens": 96, "every": 3, "deep_every": 1, "guard_sequences": 3, "guard_tokens": 128,
    "recalibration_steps": 2, "cache_megabytes": 2.0, "kv_cache_retention": 128, "max_regression": 0.2,
}


def run(name: str, output: Path, **parameters: object) -> subprocess.CompletedProcess[str]:
    "The command line in a process of its own."
    pairs = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    command = [sys.executable, "-m", "ai_sleep_constructs.workbench.cli", "run", name, *pairs, "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    "The folders of two short runs of sleep_schedule with the same seed."
    folders = []
    for name in ("first", "second"):
        output = tmp_path_factory.mktemp(name)
        done = run("sleep_schedule", output, **SHORT)
        assert done.returncode == 0, done.stderr
        assert "report.html" in done.stdout
        (finished,) = find_finished(output)
        folders.append(Path(getattr(finished, "folder", finished)))
    return folders


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_the_same_seed_gives_the_same_metrics(twice: list[Path]) -> None:
    first, second = map(result, twice)
    assert first["metrics"] == second["metrics"] and first["run_id"] == second["run_id"]
    numbers = [v for v in first["metrics"].values() if isinstance(v, float)]
    assert len(numbers) > 20 and len(set(numbers)) > 15
    timeless = ["schedule", "batch", "domain", "bits_per_byte", "cache_bytes", "nights"]
    tables = [pd.read_parquet(folder / "tables" / "batches.parquet")[timeless] for folder in twice]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_the_folder_is_whole(twice: list[Path]) -> None:
    folder = twice[0]
    record = result(folder)
    assert record["parameters"]["batches"] == 3 and record["seed"] == 0
    assert {"versions", "hardware", "git", "preset"} <= set(record)
    figures = list((folder / "figures").glob("*.html"))
    assert len(figures) >= 3
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert report.count("Plotly.newPlot") >= 3 and "https://cdn" not in report
    nbformat.validate(nbformat.read(folder / "sleep_schedule.ipynb", 4))


def test_sleep_did_something(twice: list[Path]) -> None:
    metrics = result(twice[0])["metrics"]
    nights = pd.read_parquet(twice[0] / "tables" / "nights.parquet")
    assert metrics["never_nights"] == metrics["restart_nights"] == 0 < metrics["every_nights"]
    assert metrics["every_peak_cache_MB"] < metrics["never_peak_cache_MB"]
    assert set(nights["strategy"]) == {"kv_cache_management", "attention_head_pruning", "layer_norm_recalibration"}
    assert set(nights["trigger"]) >= {"manual", "memory_pressure"}
    assert (nights["status"] == "committed").any()
    assert metrics["every_parameters"] < metrics["never_parameters"]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"model": "no-such-model"}, ["no-such-model", "reference"]),
        ({"schedules": "never,sometimes"}, ["sometimes", "trigger"]),
        ({"kv_cache_policy": "oldest"}, ["kv_cache_policy", "recency"]),
    ],
)
def test_bad_values_are_one_clear_message(tmp_path: Path, parameters: dict, words: list[str]) -> None:
    done = run("sleep_schedule", tmp_path, **parameters)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not find_finished(tmp_path) and not list(tmp_path.rglob("result.json"))


def test_every_experiment_has_both_presets() -> None:
    experiment = find_experiment("sleep_schedule")
    assert {"quick", "full"} <= set(experiment.presets)
