"""A small experiment notebook for the tests of the workbench, with a fault on request."""

import os
from pathlib import Path

import nbformat
from nbformat import v4

PARAMETERS = '''seed = 0  # random seed
output = ""
size: int = 4  # rows of the table
rate = 0.5
label = "plain"  # any text
names = ["a", "b"]
exact = False
limit: int | None = None
fault = ""'''

WORK = '''import os, random, sys, time
import pandas as pd
from ai_sleep_constructs.workbench.runs import Run

run = Run("toy", output=output, parameters=dict(size=size, rate=rate), seed=seed)
print("stdout of the notebook")
print("progress on stderr", file=sys.stderr)
random.seed(seed)
df = run.table("numbers", pd.DataFrame({"x": range(size), "y": [random.random() for _ in range(size)]}))
run.metrics({"mean": df["y"].mean(), "python": sys.executable, "cwd": os.getcwd()})
run.metric("clock", time.time(), timing=True)
run.summary(df.head(2))'''

FAULT = '''fault = fault or os.environ.get("TOY_FAULT", "")
if fault == "raise":
    raise RuntimeError("broken on purpose")
if fault == "refuse":
    raise ValueError("rate must be below 1")
if fault == "kill":
    os.kill(os.getpid(), 9)
if fault == "sleep":
    time.sleep(600)
if fault == "fill":
    run.table("big", pd.DataFrame({"y": [random.random() for _ in range(2_000_000)]}))'''

FINISH = '''if fault != "unfinished":
    from ai_sleep_constructs.workbench.plots import line
    fig = run.figure("curve", line(df, "x", "y", title="Random numbers", x_title="row", y_title="value"))
    run.finish()
    display(fig)'''


def quick_start(folder: Path) -> str:
    """A PYTHONPATH that saves each process two seconds.

    jsonschema compiles a large grammar at import where JupyterLab's optional packages are installed; it does without
    that package when importing it fails.
    """
    (folder / "rfc3987_syntax.py").write_text("raise ImportError\n")
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def write_toy(folder: Path, name: str = "toy", parameters: str = PARAMETERS) -> Path:
    """Write the experiment to FOLDER/NAME.ipynb, without kernel metadata, and return its path."""

    def code(source: str, *tags: str) -> nbformat.NotebookNode:
        return v4.new_code_cell(source, metadata={"tags": list(tags)})

    cells = [
        v4.new_markdown_cell("# A toy experiment\n\n> Numbers that mean nothing\n\nSome prose."),
        code(parameters, "parameters"),
        code('presets = {"quick": {}, "full": {"size": 8}}', "presets"),
        code(WORK), code(FAULT), code(FINISH),
    ]
    path = folder / f"{name}.ipynb"
    nbformat.write(v4.new_notebook(cells=cells), path)
    return path
