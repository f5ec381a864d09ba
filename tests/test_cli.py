"""The command line from outside: what a run leaves, what a failure says, and what neither may leave behind."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from ai_sleep_constructs import __version__
from ai_sleep_constructs.workbench import experiments
from ai_sleep_constructs.workbench.cli import main
from ai_sleep_constructs.workbench.runs import find_finished
from experiment_notebooks import quick_start, write_toy

CLI = [sys.executable, "-m", "ai_sleep_constructs.workbench.cli"]


def start(*arguments: object, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLI, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **(env or {})}, **options,  # type: ignore[call-overload]
    )


def errors(stderr: str) -> str:
    """What was said on stderr, without the progress lines."""
    return "".join(line for line in stderr.splitlines(True) if not re.fullmatch(r"toy: cell \d+\n", line))


def nothing_half_done(output: Path) -> None:
    """No hidden folder or file, and no result in a failed folder."""
    names = os.listdir(output)
    assert not [name for name in names if name.startswith(".")], names
    assert not list(output.glob("*.failed/result*.json")) and len(find_finished(output)) == len(list(output.glob("*/result.json")))


@pytest.fixture(scope="module", autouse=True)
def lighter_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", quick_start(tmp_path_factory.mktemp("path")))
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy {x}"))


def test_one_folder_holds_the_whole_run(toy: Path, tmp_path: Path) -> None:
    """Two runs with one seed, among kernels registered to other programs; then one that fails beside them."""
    wrong = tmp_path / "jupyter" / "kernels" / "python3"
    wrong.mkdir(parents=True)
    (wrong / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    env = {"JUPYTER_PATH": str(tmp_path / "jupyter"), "PATH": "/usr/bin:/bin"}
    found = []
    for _ in range(2):
        process = start("run", toy, "-p", "seed", "3", "--output", "out", env=env, cwd=tmp_path)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        (run,) = find_finished(tmp_path / "out")
        nothing_half_done(tmp_path / "out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == [run.folder.name] and not errors(err)
        assert f"report: {run.report}" in out and re.search(r"^x +y\n-+ +-+\n0 +0\.\d+", out, re.MULTILINE)
        found.append(run)
    first, second = found
    assert first.metrics == second.metrics and first.folder == second.folder
    assert first.result["timings"]["clock"] != second.result["timings"]["clock"]
    assert first.metrics["python"] == sys.executable and first.metrics["cwd"] == str(tmp_path)

    result = second.result
    assert result["parameters"]["seed"] == result["seed"] == 3 and result["preset"] == "quick"
    assert set(result["versions"]) == {"python", "torch", "transformers", "ai-sleep-constructs"}
    assert set(result["hardware"]) == {"cpu", "cores", "memory_gb", "gpu"} and result["wall_seconds"] > 0
    assert result["started"] < result["finished"] and result["started"].endswith("+00:00")
    files = sorted(str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file())
    assert files == ["figures/curve.html", "figures/plotly.min.js", "report.html", "result.json", "tables/numbers.parquet", "toy.ipynb"]
    assert abs(pd.read_parquet(run.folder / "tables/numbers.parquet")["y"].mean() - result["metrics"]["mean"]) < 1e-12

    page = run.report.read_text()
    assert page.count("plotly.js v") == 1 and "Plotly.newPlot(" in page[page.index("<main>") :] and "Random numbers" in page[page.index("<main>") :]
    assert "stdout of the notebook" in page and result["run_id"] in page and "progress on stderr" not in page
    assert "random.seed" not in page and "https://cdn" not in page
    assert not re.search(r"<script[^>]*\ssrc=|<link[^>]*\shref=|require\.min\.js|mathjax[^\"']*\.js", page, re.IGNORECASE)

    process = start("run", toy, "-p", "seed", "3", "--output", "out", env={**env, "TOY_FAULT": "raise"}, cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "RuntimeError: broken on purpose" in err
    assert [run.result for run in find_finished(tmp_path / "out")] == [result], "a failed run took the older result with it"
    nothing_half_done(tmp_path / "out")


def test_failed_runs_say_why_and_leave_no_result(toy: Path, tmp_path: Path) -> None:
    """Three at once, in one folder: they must not disturb each other either."""
    cases = {
        "refuse": (2, "toy failed in cell 6: ValueError: rate must be below 1"),
        "kill": (1, "toy failed: the kernel died in cell 6 (killed, or out of memory)"),
        "sleep": (1, "toy failed: not finished after 15 s, the time-out; it was in cell 6"),
    }
    limit = {"sleep": ["--timeout", "15"]}
    started = {
        fault: start("run", toy, "-p", "fault", fault, "--output", tmp_path, *limit.get(fault, [])) for fault in cases
    }
    for fault, (code, message) in cases.items():
        out, err = started[fault].communicate(timeout=120)
        lines = errors(err).splitlines()
        assert (started[fault].returncode, lines[0], out) == (code, f"ai-sleep: {message}", ""), err
        notebook = Path(lines[1].removeprefix("the notebook so far: "))
        assert len(lines) == 2 and message in (notebook.parent / "error.txt").read_text()
        assert "stdout of the notebook" in notebook.read_text()
    assert len(list(tmp_path.glob("toy-*.failed"))) == len(os.listdir(tmp_path)) == 3
    nothing_half_done(tmp_path)


def test_an_interruption_ends_the_kernel_and_keeps_no_result(toy: Path, tmp_path: Path) -> None:
    # A test run in the background (nohup, `&` in a script) ignores SIGINT, and so would this process: like a terminal, do not.
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "start_new_session": True}
    process = start("run", toy, "-p", "fault", "sleep", "--output", tmp_path, "--debug", **listening)
    assert process.stderr is not None
    for line in process.stderr:
        if "cell 6" in line:
            break
    kernels = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "ai-sleep: toy was interrupted in cell 6" in err and "Traceback" in err
    nothing_half_done(tmp_path)
    assert kernels and not any(Path(f"/proc/{pid}").exists() for pid in kernels), "the kernel is still running"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    """A folder on a disk of 8 MB or, where none can be mounted, processes that cannot write a file above 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if mounted:
        yield folder, {}
        subprocess.run(["umount", "-l", str(folder)], check=True)
    else:
        yield folder, {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))}


def test_a_full_disk_is_named_and_leaves_no_result(toy: Path, small_disk: tuple[Path, dict[str, object]]) -> None:
    """Full in the kernel (a table too big), and full in the caller (the report, after the figures took the space)."""
    disk, options = small_disk
    for fault in ("fill", ""):
        process = start("run", toy, "-p", "fault", fault, "--output", disk, "--min-free-mb", 0, **options)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1 and not out, err
        assert errors(err).startswith(f"ai-sleep: toy failed: no space left on {disk}\n") and "Traceback" not in err
        assert find_finished(disk) == []
        nothing_half_done(disk)
        for failed in disk.glob("*.failed"):
            subprocess.run(["rm", "-r", str(failed)], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toyy"], "unknown experiment 'toyy'. Did you mean 'toy'? Known: toy"),
        (["nowhere/toy.ipynb"], "cannot be read"),
        (["toy", "--preset", "ful"], "unknown preset 'ful'. Did you mean 'full'? Known: full, quick"),
        (["toy", "-p", "sizes", "3"], "unknown parameter 'sizes'. Did you mean 'size'?"),
        (["toy", "-p", "output", "x"], "'output' is set by the output folder"),
        (["toy", "-p", "size", "3.5"], "parameter 'size': 3.5 is not allowed; it takes a whole number (default 4)"),
        (["toy", "-p", "size", "true"], "parameter 'size': 'true' is not allowed"),
        (["toy", "-p", "rate", "nan"], "parameter 'rate': 'nan' is not allowed; it takes a finite number"),
        (["toy", "-p", "exact", "1"], "parameter 'exact': '1' is not allowed; it takes true or false"),
        (["toy", "-p", "names", "[1]"], "parameter 'names[]': 1 is not allowed"),
        (["toy", "--timeout", "0"], "timeout=0.0 is not allowed"),
        (["toy", "--output", "file/below"], "file/below cannot be written: Not a directory"),
        (["toy", "--output", "/proc/ai-sleep"], "/proc/ai-sleep cannot be written"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    arguments: list[str], message: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "experiment_folders", lambda: [toy.parent])
    Path("file").write_text("in the way")
    assert main(["run", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("ai-sleep: ") and message in err and err.count("\n") == 1 and not out
    assert os.listdir(tmp_path) == ["file"]


def test_list_shows_what_can_be_set(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(experiments, "experiment_folders", lambda: [toy.parent])
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("toy: A toy experiment (Numbers that mean nothing)\n") and "preset full: size=8" in out
    assert re.search(r"^ +size +int +4 +rows of the table$", out, re.MULTILINE) and "output" not in out


def test_list_and_errors_load_nothing_heavy() -> None:
    code = (
        "import sys; from ai_sleep_constructs.workbench.cli import main; main(['list']); main(['run', 'no such']);"
        "sys.exit(' '.join({'torch', 'papermill', 'plotly', 'pandas', 'nbconvert'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().splitlines()[-1].startswith("ai-sleep: unknown experiment 'no such'"), done.stderr
    version = subprocess.run([*CLI, "--version"], capture_output=True, text=True, timeout=60)
    assert (version.returncode, version.stdout) == (0, f"ai-sleep {__version__}\n")
