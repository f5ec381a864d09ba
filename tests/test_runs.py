"""Runs: parameters, folders and failures, through the Python interface."""

import fcntl
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from ai_sleep_constructs.workbench import runs
from ai_sleep_constructs.workbench.experiments import BadInput, find_experiment, parse_values, read_experiment, resolve
from ai_sleep_constructs.workbench.recording import RecordError, Run
from ai_sleep_constructs.workbench.runs import RunFailed, find_finished, run_experiment, run_id
from experiment_notebooks import PARAMETERS, quick_start, write_toy


def toy_result(folder: Path, **changes: object) -> Path:
    """A finished run's folder with nothing but its result.json."""
    result = {"schema": 1, "experiment": "toy", "run_id": "0" * 12, "metrics": {}, "finished": "2026-01-01T00:00:00+00:00"}
    path = folder / "toy-000000000000"
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps({**result, **changes}))
    return path


def test_declared_parameters_are_read_and_typed(tmp_path: Path) -> None:
    toy = read_experiment(write_toy(tmp_path))
    assert (toy.title, toy.subtitle) == ("A toy experiment", "Numbers that mean nothing")
    assert list(toy.parameters) == ["seed", "size", "rate", "label", "names", "exact", "limit", "fault"]
    assert toy.parameters["size"].description == "rows of the table" and toy.parameters["limit"].type == "int | None"
    pairs = [("rate", "1"), ("label", "3"), ("names", "['c']"), ("exact", "true"), ("limit", "7"), ("seed", "-1")]
    values = resolve(toy, "full", parse_values(toy, pairs))
    assert values == {"seed": -1, "size": 8, "rate": 1.0, "label": "3", "names": ["c"], "exact": True, "limit": 7, "fault": ""}
    assert isinstance(values["rate"], float)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PARAMETERS.replace('output = ""', ""), 'must hold output = ""'),
        (PARAMETERS.replace("seed = 0", "seed = 0.5"), "must hold seed"),
        (PARAMETERS.replace("rate = 0.5", "rate = 1 / 2"), "rate is not a literal: 1 / 2"),
        (PARAMETERS.replace("rate = 0.5", "print(1)"), "may hold only assignments"),
        (PARAMETERS.replace("rate = 0.5", "rate = 1e999"), "'rate': inf is not allowed"),
        (PARAMETERS.replace("size: int = 4", "length = 4"), "unknown parameter 'size'"),
    ],
)
def test_a_notebook_that_breaks_the_contract_is_named(tmp_path: Path, source: str, message: str) -> None:
    path = write_toy(tmp_path, parameters=source)
    with pytest.raises(BadInput, match="toy.ipynb") as caught:
        read_experiment(path)
    assert message in str(caught.value)


def test_run_id_stands_for_parameters_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = find_experiment("toy", [write_toy(tmp_path).parent])
    values = resolve(toy, "quick", {})
    first = run_id(toy, values)
    assert len(first) == 12 and int(first, 16) >= 0
    assert first == run_id(toy, dict(reversed(list(values.items()))))
    assert first != run_id(toy, {**values, "rate": 0.25})
    other = write_toy(tmp_path)
    other.write_text(other.read_text().replace("random.random()", "random.gauss()"))
    assert first != run_id(read_experiment(other), values)
    monkeypatch.setattr(runs, "source_hash", lambda: "another version of the package")
    assert first != run_id(toy, values)


def test_only_a_whole_result_under_its_own_name_counts_as_finished(tmp_path: Path) -> None:
    good = toy_result(tmp_path / "a")
    assert [run.folder for run in find_finished(tmp_path / "a")] == [good]
    good.rename(good.with_name(".toy-000000000000.partial"))
    assert find_finished(tmp_path / "a") == []
    toy_result(tmp_path / "a").rename(good.with_name("toy-000000000000.failed"))
    assert find_finished(tmp_path / "a") == []
    toy_result(tmp_path / "b", run_id="1" * 12)
    toy_result(tmp_path / "c", finished=None)
    toy_result(tmp_path / "d", schema=99)
    cut = toy_result(tmp_path / "e") / "result.json"
    cut.write_text(cut.read_text()[:-5])
    assert [find_finished(tmp_path / name) for name in "bcde"] == [[], [], [], []]
    assert find_finished(tmp_path / "nowhere") == []


def test_an_older_result_is_put_back_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    good = toy_result(tmp_path)
    with pytest.raises(FileNotFoundError):
        runs._publish(tmp_path / "not there", good)
    assert [run.folder for run in find_finished(tmp_path)] == [good] and os.listdir(tmp_path) == [good.name]


def test_two_runs_with_one_id_do_not_mix(tmp_path: Path) -> None:
    toy = read_experiment(write_toy(tmp_path))
    partial = tmp_path / "runs" / f".toy-{run_id(toy, resolve(toy, 'quick', {}))}.partial"
    partial.mkdir(parents=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="in progress"):
            run_experiment(toy.path, output=tmp_path / "runs", progress=False)
    finally:
        os.close(handle)
    assert partial.is_dir()


def test_too_little_space_stops_a_run_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=f"no space left on {tmp_path}.*at least 1e\\+12 MB wanted"):
        run_experiment(write_toy(tmp_path), output=tmp_path / "runs", min_free_mb=1e12)
    assert os.listdir(tmp_path / "runs") == []


def test_a_notebook_that_never_finishes_its_record_gives_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", quick_start(tmp_path))
    with pytest.raises(RunFailed, match=r"must call run.finish\(\)") as caught:
        run_experiment(write_toy(tmp_path), {"fault": "unfinished"}, output=tmp_path / "runs", progress=False)
    assert not caught.value.bad_input
    assert find_finished(tmp_path / "runs") == [] and [p.suffix for p in (tmp_path / "runs").iterdir()] == [".failed"]


def test_recording_by_hand_writes_nothing_and_checks_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run("toy", output="", parameters={}, seed=0)
    df = pd.DataFrame({"x": [1.0, None]})
    assert run.table("t", df) is df and run.summary(df) is df
    run.metric("t", df["x"].iloc[0])
    run.finish()
    assert os.listdir(tmp_path) == []
    for call in (
        lambda: run.metric("loss", float("inf")),
        lambda: run.metric("losses", [1.0]),
        lambda: run.table("../t", df),
        lambda: run.summary(pd.DataFrame({"x": [float("inf")]})),
        lambda: Run("toy", tmp_path, {"x": float("nan")}).finish(),
    ):
        with pytest.raises(RecordError):
            call()
    assert os.listdir(tmp_path) == []
