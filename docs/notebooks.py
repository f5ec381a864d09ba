"""Reading a notebook of this project for people: no directives, no hidden cells, every link checked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?\s*(.*?)\s*$")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_LINK = re.compile(r"(?P<code>(`+)[^`].*?\2)|(?P<before>\]\(\s*|^\s{0,3}\[[^\]]+\]:\s+)(?P<target>[^\s)]+)")
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#|//")  # a URL with a scheme, a place on the same page, another host


class NotebookError(Exception):
    """A notebook that cannot be shown as it is: no title, a broken link, an error among its outputs."""


def directives(source: str) -> dict[str, str]:
    """The `#| name: value` lines of a code cell, by name."""
    return {found[1]: found[2].lower() for line in source.splitlines() if (found := _DIRECTIVE.match(line))}


def _joined(text: str | list[str]) -> str:
    """Notebook files keep a text as one string or as a list of lines."""
    return text if isinstance(text, str) else "".join(text)


def read(path: Path) -> dict[str, Any]:
    """The notebook at `path` without raw cells, hidden cells and directive lines, every text as one string.

    A cell whose source or output is not to be shown gets the tag `remove-input` or `remove-output`. (Plain JSON: to import
    `nbformat` can take seconds.)
    """
    name = path.relative_to(ROOT).as_posix()
    try:
        nb = json.loads(path.read_text(encoding="utf-8"))
        cells = [{**cell, "source": _joined(cell["source"])} for cell in nb["cells"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise NotebookError(f"{name}: not a readable notebook ({error!r})") from error
    nb["cells"] = []
    for cell in cells:
        if cell["cell_type"] == "code":
            said = directives(cell["source"])
            if "hide" in said or said.get("include") == "false":
                continue
            cell["source"] = "\n".join(line for line in cell["source"].splitlines() if not _DIRECTIVE.match(line)).strip("\n")
            tags = list(cell["metadata"].get("tags", []))
            tags += ["remove-input"] if said.get("echo") == "false" else []
            tags += ["remove-output"] if said.get("output") == "false" else []
            cell["metadata"] = {"tags": tags} if tags else {}
            if any(output["output_type"] == "error" for output in cell["outputs"]) and "raises-exception" not in tags:
                raise NotebookError(f"{name}: a cell ended in an error; repair it and run the notebook again:\n{cell['source']}")
            for output in cell["outputs"]:
                if "text" in output:
                    output["text"] = _joined(output["text"])
                for kind, value in output.get("data", {}).items():
                    output["data"][kind] = value if isinstance(value, dict) else _joined(value)
        if cell["cell_type"] != "raw" and (cell["source"].strip() or cell.get("outputs")):
            nb["cells"].append(cell)
    return nb


def title(nb: dict[str, Any], name: str) -> tuple[str, str]:
    """The notebook's H1 and, if there is one, the `> subtitle` under it; NotebookError when its first cell has no H1."""
    cells = nb["cells"]
    first = cells[0]["source"].splitlines() if cells and cells[0]["cell_type"] == "markdown" else []
    if not first or not first[0].startswith("# "):
        raise NotebookError(f"{name}: the first cell must be Markdown that begins with a title, `# Title`")
    subtitle = next((line[1:].strip() for line in first[1:] if line.startswith(">")), "")
    return first[0][2:].strip(), subtitle


def relink(markdown: str, resolve: Callable[[str], str]) -> str:
    """`markdown` with every relative link target replaced by `resolve(target)`; code is left alone."""
    lines, fence = [], ""
    for line in markdown.split("\n"):
        mark = _FENCE.match(line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        elif not fence:
            line = _LINK.sub(lambda m: m[0] if m["code"] or _ELSEWHERE.match(m["target"]) else m["before"] + resolve(m["target"]), line)
        lines.append(line)
    return "\n".join(lines)


def repository_path(target: str, page: str) -> tuple[str, str]:
    """Where `target`, a relative link on the page at `page`, points: its path from the repository's root, and the `#place`.

    Raises NotebookError when nothing is there.
    """
    path, hash_, place = target.partition("#")
    found = os.path.normpath(os.path.join(os.path.dirname(page), path)).replace(os.sep, "/")  # noqa: PTH118, PTH120
    if found.startswith("..") or not (ROOT / found).exists():
        raise NotebookError(f"{page}: broken link {target!r}: there is no {found} in the project")
    return found, hash_ + place
