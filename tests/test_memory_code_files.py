"""Walking a repository: what is left out and why, hashes, parallel parsing, watching."""

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from ai_sleep_constructs.memory.code.files import Changes, changed, parse_files, walk, watch
from ai_sleep_constructs.memory.code.parsing import Parsed
from ai_sleep_constructs.memory.code.words import words


def write(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def paths(root: Path, *exclude: str) -> list[str]:
    return [file.path for file in walk(root, exclude).files]


def test_patterns_are_matched_from_the_root(tmp_path: Path) -> None:
    root = tmp_path / "tests" / "build"
    write(root, dict.fromkeys(("a.py", "tests/a.py", "src/tests/deep/b.py", "src/build/c.py", "src/contests/d.py", "src/x_pb2.py"), ""))
    everything = ["a.py", "src/build/c.py", "src/contests/d.py", "src/tests/deep/b.py", "src/x_pb2.py", "tests/a.py"]
    assert paths(root) == everything
    without = [path for path in everything if "/tests/" not in f"/{path}"]
    assert paths(root, "*/tests/*") == paths(root, "tests") == paths(root, "tests/") == without
    assert paths(root, "tests/*") == everything[:-1]
    assert paths(root, "*_pb2.py", "src/build") == ["a.py", "src/contests/d.py", "src/tests/deep/b.py", "tests/a.py"]
    with pytest.raises(TypeError, match="exclude: expected a list of patterns, got the str"):
        walk(root, "tests")


def test_gitignore_nested_negated_and_above(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": "out/\n*.gen.js\n/only_top.py\n", "pkg/.gitignore": "!keep.gen.js\nlocal.py\n", "out/a.py": "",
                     "a.gen.js": "", "pkg/keep.gen.js": "", "pkg/local.py": "", "only_top.py": "", "pkg/only_top.py": "", ".git/x.py": ""})
    assert paths(tmp_path) == ["pkg/keep.gen.js", "pkg/only_top.py"]
    assert "out/a.py" in [file.path for file in walk(tmp_path, gitignore=False).files]
    write(tmp_path, {"pkg/deep/b.gen.js": "", "pkg/deep/c.js": ""})
    assert paths(tmp_path / "pkg" / "deep") == ["c.js"]


def test_strange_files_are_skipped_with_a_reason(tmp_path: Path) -> None:
    write(tmp_path, {"ok.py": "def f(): pass", "binary.c": b"\x7fELF\0", "large.js": "x" * 1_000_001, "notes.md": "", "env/pyvenv.cfg": "",
                     "env/lib/site.py": "", "node_modules/m.js": "", "naïve 名.py": "x = 1"})
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "link.py").symlink_to(tmp_path / "ok.py")
    found = walk(tmp_path)
    assert [file.path for file in found.files] == ["naïve 名.py", "ok.py"]
    assert found.skipped == {"binary.c": "binary", "large.js": "larger than 1000000 bytes"}
    assert found.files[1].digest == hashlib.sha256(b"def f(): pass").hexdigest() and found.files[1].size == 13
    with pytest.raises(NotADirectoryError, match="root: .*ok.py is not a folder"):
        walk(tmp_path / "ok.py")


def test_only_changed_files(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "1", "b.py": "2", "c.py": "3"})
    known = {file.path: file.digest for file in walk(tmp_path).files}
    os.utime(tmp_path / "a.py", (1, 1))
    (tmp_path / "b.py").write_text("22")
    (tmp_path / "c.py").unlink()
    write(tmp_path, {"d.py": ""})
    new, gone = changed(walk(tmp_path).files, known)
    assert ([file.path for file in new], gone) == (["b.py", "d.py"], ["c.py"])


@pytest.mark.parametrize("workers", [1, 2])
def test_parsing_keeps_the_order_and_says_what_went_away(tmp_path: Path, workers: int) -> None:
    write(tmp_path, {f"f{index:02}.py": f"def f{index}(): pass" for index in range(9)})
    files = walk(tmp_path).files
    (tmp_path / "f03.py").unlink()
    (tmp_path / "f04.py").write_text("def other(): pass")
    parsed = list(parse_files(tmp_path, files, workers=workers, chunk=2))
    assert [file.path for file, _ in parsed] == [file.path for file in files]
    assert isinstance(parsed[3][1], str) and "f03.py" in parsed[3][1]
    names = [found.entities[0].name for _, found in parsed if isinstance(found, Parsed)]
    assert names == ["f0", "f1", "f2", "other", "f5", "f6", "f7", "f8"]
    assert parsed[4][0].digest != files[4].digest
    with pytest.raises(ValueError, match="workers: expected an int >= 1, got 0"):
        parse_files(tmp_path, files, workers=0)


def test_watch_tells_of_source_files_only(tmp_path: Path) -> None:
    write(tmp_path, {".gitignore": "out/", "a.py": "1", "b.py": "1"})
    stop = threading.Event()
    seen: list[Changes] = []

    def listen() -> None:
        seen.extend(watch(tmp_path, ["skip/*"], stop=stop))

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        deadline = time.monotonic() + 15
        while not seen and time.monotonic() < deadline:  # until the watch has begun
            write(tmp_path, {"a.py": str(time.monotonic())})
            time.sleep(0.2)
        write(tmp_path, {"out/x.py": "", "skip/y.py": "", "notes.md": ""})
        (tmp_path / "b.py").unlink()
        while not any("b.py" in change.removed for change in seen) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive() and all(isinstance(change, Changes) for change in seen)
    assert {path for change in seen for path in change.changed} == {"a.py"}
    assert {path for change in seen for path in change.removed} == {"b.py"}


@pytest.mark.parametrize("text, expected, whole", [
    ("parseHTTPRequest2", ["parse", "http", "request", "2"], ["parsehttprequest2"]), ("snake_case__x", ["snake", "case", "x"], []),
    ("MAX_SIZE", ["max", "size"], []), ("sha256sum", ["sha", "256", "sum"], ["sha256sum"]), ("a.b->c()", ["a", "b", "c"], []),
    ("ÄrgerNis", ["ärger", "nis"], ["ärgernis"]), ("日本語", ["日本語"], []), ("_", [], []), ("getURL", ["get", "url"], ["geturl"]),
    ("IOError", ["io", "error"], ["ioerror"]), ("aB", ["a", "b"], ["ab"]),
])
def test_words(text: str, expected: list[str], whole: list[str]) -> None:
    assert words(text) == expected
    assert words(text, whole=True) == expected + whole
    assert words(f"x {text} y", whole=True) == ["x", *expected, *whole, "y"]
