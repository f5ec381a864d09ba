"""Build the documentation site from the notebooks: `python docs/build.py [--output _site]`.

Works without a network. Nothing is executed: the outputs that the notebooks carry are shown. Ends with exit code 1 when a
notebook has no title, when a link leads nowhere, or at any warning of Sphinx.
"""

import argparse
import configparser
import hashlib
import importlib.util
import json
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import api
from notebooks import ROOT, NotebookError, read, relink, repository_path, title

PACKAGE = "ai_sleep_constructs"
PLOTLY = "application/vnd.plotly.v1+json"
SHOWN = (PLOTLY, "text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain")
_REMOTE_TAG = re.compile(
    r"""<(?:script|link|img|iframe|source|video|audio|embed|object)\b[^>]*?\s(?:src|href|data)\s*=\s*["']?(?:https?:)?//[^\s"'>]*""", re.I
)
_REMOTE_STYLE = re.compile(r"""(?:@import|url\()\s*["'(]*(?:https?:)?//[^\s"')]*""", re.I)
_STYLE = re.compile(r"<style\b[^>]*>(.*?)</style>", re.I | re.S)
CAPTIONS = {"howto": "How-to", "explanations": "Explanations", "tutorials": "Tutorials"}


class Site:
    """The pages of the site as Sphinx's source tree in a temporary folder."""

    def __init__(self, source: Path) -> None:
        self.source = source
        config = configparser.ConfigParser()
        config.read(ROOT / "settings.ini")
        self.project = config["DEFAULT"]
        self.notebooks = {f: f.removeprefix("nbs/") for f in _visible("nbs") + _visible("experiments")}
        self.modules = {f: f"api/{_module(f)}.md" for f in _visible(PACKAGE, ".py") if _exported(f)}
        self.texts = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
        self.texts = {f: page for f, page in self.texts.items() if (ROOT / f).exists()}
        self.folders = sorted({parent for page in self.notebooks.values() for parent in _parents(page) if (ROOT / PACKAGE / parent).is_dir()})
        indexes = {f"nbs/{folder}": f"{folder}/index.md" for folder in self.folders}
        self.pages = {**self.notebooks, **self.modules, **self.texts, **indexes, "README.md": "index.ipynb"}
        self.titles: dict[str, tuple[str, str]] = {}

    def write(self) -> None:
        """Write every page; NotebookError names whatever cannot be shown."""
        if "nbs/index.ipynb" not in self.notebooks:
            raise NotebookError("nbs/index.ipynb is missing: it is the start page")
        errors = []
        for file in self.notebooks:
            try:
                self._notebook(file)
            except NotebookError as error:
                errors.append(str(error))
        for file, page in self.texts.items():
            try:
                text = (ROOT / file).read_text(encoding="utf-8")
                self._text(page, relink(text, lambda target: self.link(target, file)))  # noqa: B023 (called at once)
            except NotebookError as error:
                errors.append(str(error))
        if errors:
            raise NotebookError("\n".join(errors))
        for file, page in self.modules.items():
            notebook = f"nbs/{file.removeprefix(PACKAGE + '/').removesuffix('.py')}.ipynb"
            if notebook not in self.notebooks:
                raise NotebookError(f"{file}: exported, but there is no {notebook}")
            self._text(page, api.page(ROOT / file, _module(file), _relative(self.notebooks[notebook], page)))
        self._navigation()
        static = self.source / "_static"
        shutil.copytree(ROOT / "docs" / "static", static, dirs_exist_ok=True)
        plotly = importlib.util.find_spec("plotly")  # found, not imported: that would take a second
        if plotly is None or plotly.origin is None:
            raise NotebookError("plotly is not installed; install the project with '.[dev]'")
        shutil.copy(Path(plotly.origin).parent / "package_data" / "plotly.min.js", static)
        shutil.copy(ROOT / "docs" / "conf.py", self.source)

    def link(self, target: str, file: str) -> str:
        """The link on the site for `target`, a relative link in `file`."""
        found, place = repository_path(target, file)
        if found in self.pages:
            return _relative(self.pages[found], self.pages[file]) + place
        if found.endswith((".png", ".svg", ".jpg", ".jpeg", ".gif")):
            copy = self.source / "pictures" / found
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / found, copy)
            return _relative(f"pictures/{found}", self.pages[file])
        kind = "tree" if (ROOT / found).is_dir() else "blob"
        url = f"https://github.com/{self.project['user']}/{self.project['repo']}"
        return f"{url}/{kind}/{self.project['branch']}/{found}{place}"

    def _notebook(self, file: str) -> None:
        nb, page = read(ROOT / file), self.notebooks[file]
        self.titles[page] = title(nb, file)
        figures = 0
        for cell in nb["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = relink(cell["source"], lambda target: self.link(target, file))
                continue
            kept = []
            for output in cell["outputs"]:
                if "data" in output and not _show(output, page, first=figures == 0):
                    continue
                figures += "plotly-figure" in output.get("data", {}).get("text/html", "")
                kept.append(output)
            cell["outputs"] = kept
        module = f"{PACKAGE}/{page.removesuffix('.ipynb')}.py"
        if module in self.modules:
            link = _relative(self.modules[module], page)
            nb["cells"].append(_markdown("signatures", f"Signatures at a glance: [`{_module(module)}`]({link})."))
        nb["metadata"] = {
            "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "pygments_lexer": "ipython3"},
        }
        self._text(page, json.dumps(nb))

    def _text(self, page: str, text: str) -> None:
        file = self.source / page
        if file.exists():
            raise NotebookError(f"{page}: two pages want this place on the site")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    def _navigation(self) -> None:
        """An index page for every package, one for the signatures, and the table of contents on the start page."""
        packages = self.folders
        for folder in packages:
            docstring = re.match(r'"""(.*?)"""', (ROOT / PACKAGE / folder / "__init__.py").read_text(encoding="utf-8"), re.S)
            below = [f"{f}/index" for f in packages if posixpath.dirname(f) == folder]
            own = [page for page in self.notebooks.values() if posixpath.dirname(page) == folder]
            listed = [f"- [{self.titles[page][0]}]({posixpath.basename(page)}): {self.titles[page][1]}" for page in own]
            listed += [f"- [`{f}`]({_relative(f + '.md', folder + '/index.md')})" for f in below]
            name = f"{PACKAGE}.{folder.replace('/', '.')}"
            parts = [f"# `{name.split('.', 1)[1]}`", docstring[1].strip() if docstring else "", "\n".join(listed)]
            self._text(f"{folder}/index.md", "\n\n".join([*parts, _toctree("", [*own, *below])]) + "\n")
        parts = ["# Signatures", "Every public name of every module, with its docstring.", _toctree("", list(self.modules.values()), "")]
        self._text("api/index.md", "\n\n".join(parts) + "\n")

        groups: dict[str, list[str]] = {CAPTIONS["tutorials"]: []}
        for page in self.notebooks.values():
            top = page.split("/")[0]
            if top not in packages and page != "index.ipynb":
                groups.setdefault(CAPTIONS.get(top, top.removesuffix(".ipynb").capitalize()), []).append(page)
        groups["Reference"] = [*(f"{f}/index" for f in packages if "/" not in f), "api/index"]
        groups["Project"] = list(self.texts.values())
        nb = json.loads((self.source / "index.ipynb").read_text(encoding="utf-8"))
        nb["cells"] += [_markdown(f"contents-{number}", _toctree(caption, pages)) for number, (caption, pages) in enumerate(groups.items()) if pages]
        (self.source / "index.ipynb").write_text(json.dumps(nb), encoding="utf-8")


def _show(output: dict[str, Any], page: str, first: bool) -> bool:
    """Leave in `output` only what a static page can show; False if nothing is left."""
    data = output["data"]
    if "application/vnd.jupyter.widget-view+json" in data:  # a progress bar or a slider without its kernel
        return False
    output["data"] = {kind: data[kind] for kind in SHOWN if kind in data}
    if PLOTLY in data:
        figure = {"layout": {}, **{key: value for key, value in data[PLOTLY].items() if key in ("data", "layout", "frames")}}
        text = json.dumps({**figure, "config": {"responsive": True, "displaylogo": False}}).replace("<", "\\u003c")
        name = "figure-" + hashlib.sha256((page + text).encode()).hexdigest()[:12]
        script = f'<script src="{_relative("_static/plotly.min.js", page)}"></script>' if first else ""
        div = f'<div id="{name}" class="plotly-figure"></div>{script}<script>Plotly.newPlot("{name}", {text})</script>'
        output["data"] = {"text/html": div}
    return bool(output["data"])


def _markdown(identity: str, source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": identity, "metadata": {}, "source": source}


def _visible(folder: str, suffix: str = ".ipynb") -> list[str]:
    files = (path.relative_to(ROOT) for path in (ROOT / folder).rglob(f"*{suffix}"))
    return sorted(f.as_posix() for f in files if not any(part.startswith((".", "_")) for part in f.parts))


def _parents(page: str) -> list[str]:
    """The folders that `page` lies in, outermost last."""
    return [parent.as_posix() for parent in Path(page).parents if parent.name]


def _exported(file: str) -> bool:
    return "# AUTOGENERATED! DO NOT EDIT!" in (ROOT / file).read_text(encoding="utf-8")


def _module(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def _relative(page: str, start: str) -> str:
    return posixpath.relpath(page, posixpath.dirname(start) or ".")


def _toctree(caption: str, pages: list[str], hidden: str = ":hidden:") -> str:
    options = [f":caption: {caption}" if caption else "", hidden, ":maxdepth: 1"]
    entries = [f"/{page.removesuffix('.md').removesuffix('.ipynb')}" for page in pages]
    return "\n".join(["```{toctree}", *(option for option in options if option), "", *entries, "```"])


def remote(site: Path) -> list[str]:
    """Every script, style, picture or frame of the built site that a browser would fetch from another host."""
    found = []
    for file in sorted(file for suffix in ("html", "css") for file in site.rglob(f"*.{suffix}")):
        text = file.read_text(encoding="utf-8")
        styles = [text] if file.suffix == ".css" else _STYLE.findall(text)
        tags = _REMOTE_TAG.findall(text) if file.suffix == ".html" else []
        found += [f"{file.relative_to(site)}: {what}" for what in [*tags, *(u for style in styles for u in _REMOTE_STYLE.findall(style))]]
    return found


def build(output: Path) -> int:
    """Build the site into the folder `output`, which takes the place of an earlier build; the exit code."""
    if output.exists() and not (output.is_dir() and (not any(output.iterdir()) or (output / ".buildinfo").exists())):
        print(f"--output {output}: there is something else already, and it is left alone; name a new folder", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "source").mkdir()
        try:
            Site(work / "source").write()
        except NotebookError as error:
            print(error, file=sys.stderr)
            return 1
        command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(work / "doctrees")]
        done = subprocess.run([*command, str(work / "source"), str(work / "html")], check=False)
        if done.returncode:
            return 1
        if fetched := remote(work / "html"):
            print("\n".join(["the site must work without a network, but these would be fetched:", *fetched]), file=sys.stderr)
            return 1
        if output.exists():
            shutil.rmtree(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(work / "html", output)
    print(f"{output / 'index.html'}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "_site", help="the folder to write (default: _site)")
    sys.exit(build(parser.parse_args().output))
