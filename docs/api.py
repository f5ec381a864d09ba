"""A Markdown page with the signatures and docstrings of one exported module, read from its source without importing it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _fenced(text: str, language: str, *options: str) -> str:
    ticks = "`" * 3
    while ticks in text:
        ticks += "`"
    return "\n".join([f"{ticks}{{code-block}} {language}", *options, "", text, ticks])


def _docstring(node: ast.AST) -> list[str]:
    text = ast.get_docstring(node) if isinstance(node, _Function | ast.ClassDef) else None
    return [_fenced(inspect.cleandoc(text), "text", ":class: docstring")] if text else []


def _signature(node: _Function | ast.ClassDef, lines: list[str]) -> str:
    """The source of the signature, with the comments that say what an argument is for."""
    first, body = min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.body[0]
    if body.lineno == _end(node):  # written on one line: `def f(x): return x`
        bare = ast.unparse(node).splitlines()
        return "\n".join(bare[: len(node.decorator_list) + 1])
    return textwrap.dedent("\n".join(lines[first - 1 : body.lineno - 1])).rstrip()


def _end(node: _Function | ast.ClassDef) -> int:
    """The last line of the signature."""
    parts: list[ast.expr] = list(node.bases) if isinstance(node, ast.ClassDef) else [*node.args.defaults]
    if not isinstance(node, ast.ClassDef):
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        parts += [a.annotation for a in every if a.annotation] + [d for d in node.args.kw_defaults if d]
        parts += [node.returns] if node.returns else []
    return max([node.lineno, *(part.end_lineno or part.lineno for part in parts)])


def _patched(node: _Function) -> str | None:
    """The class that a function decorated with `@patch` becomes a method of."""
    for decorator in node.decorator_list:
        call = decorator.func if isinstance(decorator, ast.Call) else decorator
        if isinstance(call, ast.Name) and call.id == "patch" and node.args.args and node.args.args[0].annotation:
            return ast.unparse(node.args.args[0].annotation)
        if isinstance(call, ast.Name) and call.id == "patch_to" and isinstance(decorator, ast.Call) and decorator.args:
            return ast.unparse(decorator.args[0])
    return None


def _class(node: ast.ClassDef, patched: list[_Function], lines: list[str]) -> list[str]:
    """The class with its public fields or members, then its public methods, those patched in included."""
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign | ast.Assign) and not _target(item).startswith("_")]
    source = [textwrap.dedent("\n".join(lines[item.lineno - 1 : item.end_lineno])) for item in fields]
    parts = [_fenced("\n".join([_signature(node, lines), *(textwrap.indent(text, "    ") for text in source)]), "python")]
    parts += _docstring(node)
    for method in [item for item in node.body if isinstance(item, _Function)] + patched:
        if not method.name.startswith("_") or method.name == "__init__":
            parts += [f"### `{node.name}.{method.name}`", _fenced(_signature(method, lines), "python"), *_docstring(method)]
    return parts


def _target(node: ast.Assign | ast.AnnAssign) -> str:
    return ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)


def page(file: Path, module: str, notebook: str) -> str:
    """The page of `module`, whose source is `file`; `notebook` is the link to the notebook that explains it."""
    text = file.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    public: list[str] = []
    for item in tree.body:
        if isinstance(item, ast.Assign) and _target(item) == "__all__":
            public = ast.literal_eval(item.value)
    patches: dict[str, list[_Function]] = {}
    for item in tree.body:
        if isinstance(item, _Function) and (owner := _patched(item)):
            patches.setdefault(owner, []).append(item)
    parts = [f"# `{module.partition('.')[2]}`", f"The module `{module}`, explained and shown in [its notebook]({notebook})."]
    for item in tree.body:
        if isinstance(item, ast.ClassDef) and item.name in public:
            parts += [f"## `{item.name}`", *_class(item, patches.get(item.name, []), lines)]
        elif isinstance(item, _Function) and item.name in public and not _patched(item):
            parts += [f"## `{item.name}`", _fenced(_signature(item, lines), "python"), *_docstring(item)]
        elif isinstance(item, ast.Assign | ast.AnnAssign):
            source = "\n".join(lines[item.lineno - 1 : item.end_lineno])
            if _target(item) in public and len(source) < 1000:
                parts += [f"## `{_target(item)}`", _fenced(source, "python")]
    return "\n\n".join(parts) + "\n"
