"""Make README.md from nbs/index.ipynb: `python docs/readme.py`, or `--check` to see whether it is up to date."""

import argparse
import difflib
import sys
from typing import Any

from notebooks import ROOT, NotebookError, read, relink, repository_path, title

SOURCE = "nbs/index.ipynb"


def shown(output: dict[str, Any]) -> str:
    """A code cell's output as Markdown: Markdown as it is, anything else as indented text."""
    if output["output_type"] == "stream":
        text = output["text"]
    elif "text/markdown" in output["data"]:
        return str(output["data"]["text/markdown"])
    else:
        text = output["data"].get("text/plain", "")
    return "\n".join(f"    {line}".rstrip() for line in text.rstrip().splitlines())


def readme() -> str:
    """The text of README.md; every relative link leads from the repository's root."""
    nb = read(ROOT / SOURCE)
    title(nb, SOURCE)
    parts = []
    for cell in nb["cells"]:
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "markdown":
            parts.append(relink(cell["source"], lambda target: "".join(repository_path(target, SOURCE))))
            continue
        if "remove-input" not in tags:
            parts.append(f"```python\n{cell['source']}\n```")
        if "remove-output" not in tags:
            parts += [shown(output) for output in cell["outputs"]]
    note = f"<!-- made from {SOURCE} by docs/readme.py: edit the notebook -->"
    return "\n\n".join([note, *(part.strip("\n") for part in parts if part.strip())]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if README.md is out of date")
    check = parser.parse_args().check
    try:
        new = readme()
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    file = ROOT / "README.md"
    old = file.read_text(encoding="utf-8") if file.exists() else ""
    if check and new != old:
        print(f"README.md does not match {SOURCE}; run: python docs/readme.py", file=sys.stderr)
        sys.stderr.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "made now", n=1))
        return 1
    if new != old:
        temporary = file.with_suffix(".md.tmp")
        temporary.write_text(new, encoding="utf-8")
        temporary.replace(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
