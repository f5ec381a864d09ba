"""What memories of code must survive: a night, a cleared store, other threads and processes, locks, and metadata of one's own."""

import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from code_memories import index, until

from ai_sleep_constructs.memory.code.context import CodeContext
from ai_sleep_constructs.memory.code.system import CodeMemorySystem

SAME = 'def settings_of(path):\n    """Read the settings of the program."""\n    with open(path) as file:\n        return file.read()\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    for name in ("alpha.py", "beta.py"):
        (tmp_path / "code" / name).write_text(SAME)
    (tmp_path / "code" / "main.py").write_text("from alpha import settings_of\n\n\ndef run(path):\n    return settings_of(path)\n")
    return tmp_path / "code"


def system_of(path=":memory:", **options):
    return CodeMemorySystem(None, path, **{"embedder": None, "enable_recency_boost": False, "relevance_threshold": 0.0, **options})


def edges(graph):
    return {(one.split("::")[-1], other.split("::")[-1]) for one, other in graph.to_networkx().edges}


# Nights and losses


def test_a_night_leaves_code_alone_and_the_budget_is_for_the_notes(folder):
    with system_of() as system:
        made = index(system, folder)
        notes = ["The rent of the flat is 500 euros.", "The rent of the flat is 500 euros!", "Our dog is called Rex.", "The guest network is Lakeside."]
        system.add_memories(notes)
        code = [one for one in system.store.list() if one.id in made]
        report = system.sleep_sync(2)
        assert (report["merged"], report["dropped"]) == (1, 1) and len(system) == len(made) + 2
        assert [one for one in system.store.list() if one.id in made] == code
        assert system.sleep_sync(2)["id"] is None and system.sleep_sync(0.5)["dropped"] == 1 and len(system) == len(made) + 1
        assert system.consolidate(1)["dropped"] == 0 and index(system, folder) == []


def test_code_that_is_read_while_a_night_is_planned_costs_no_note(folder):
    def model(prompt):
        index(system, folder)
        return "The garden wants warm soil and much water."

    with CodeMemorySystem(model, ":memory:", embedder=None) as system:
        system.add_memories(["Tomatoes need warm soil.", "Tomatoes need much water in warm soil.", "Basil likes the warm soil that tomatoes need.", "Rex is a dog."])
        report = system.sleep_sync(5, summarise=True)
        assert report["summarised"] == 1 and report["dropped"] == 0 and len(system) == 5 + 3


def test_a_cleared_system_is_indexed_anew(folder):
    with system_of() as system:
        made = index(system, folder)
        system.add_memory("A note.")
        other = CodeMemorySystem(None, system.store.path, embedder=None, namespace="other")
        index(other, folder)
        assert system.clear_all_memories() == len(made) + 1 and len(system) == 0
        assert system.get_stats()["total_files"] == 0 and len(system.graph) == 0
        assert len(index(system, folder)) == len(made) == len(system) and edges(system.graph) == {("run", "settings_of")}
        assert len(other) == len(made) and index(other, folder) == []
        other.close()


def test_a_deleted_memory_of_code_comes_back_with_its_file(folder):
    with system_of() as system:
        made = index(system, folder)
        assert system.delete_memory(made[0])
        assert index(system, folder) == [] and len(system) == len(made) - 1
        (folder / "alpha.py").write_text(SAME + "\n")
        assert len(index(system, folder)) == 1 and len(system) == len(made)


# The graph


def test_questions_while_another_thread_reads_files(tmp_path):
    files = [tmp_path / f"m{number}.py" for number in range(6)]

    def write(version):
        for number, file in enumerate(files):
            names = [f"question_{number}_{version}_{i}" for i in range(60)]
            file.write_text("".join(f"def {name}(x):\n    return {other}(x)\n\n\n" for name, other in zip(names, names[1:] + names[:1], strict=True)))

    write(0)
    with system_of() as system:
        index(system, tmp_path)
        errors, stop = [], threading.Event()

        def ask():
            try:
                while not stop.is_set():
                    system.retrieve_relevant_memories_sync("question 1 0")
            except BaseException as error:
                errors.append(error)

        switch = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for version in range(1, 12):
            write(version)
            index(system, tmp_path)
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(switch)
        assert errors == []


def test_a_file_is_in_the_graph_once_from_wherever_it_is_read(folder, monkeypatch):
    with system_of() as system:
        index(system, folder)
        before = len(system.graph)
        monkeypatch.chdir(folder)
        (folder / "main.py").write_text("from beta import settings_of\n\n\ndef run(path):\n    return settings_of(path)\n")
        index(system, folder)
        assert len(system.graph) == before == 3
        system.index_file("beta.py")
        system.index_file("alpha.py")
        assert sorted(system.graph.to_networkx().nodes) == ["alpha.py::settings_of", "beta.py::settings_of", "main.py::run"]
        assert system.graph.callees("main.py::run") == ["beta.py::settings_of"]


def test_two_files_that_are_shown_by_one_path_do_not_take_each_other_along(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.py").write_text(f"def in_{name}():\n    return 1\n")
    with system_of() as system:
        for name in ("one", "two"):
            monkeypatch.chdir(tmp_path / name)
            system.index_file("same.py")
            assert f"same.py::in_{name}" in system.graph
        (tmp_path / "two" / "same.py").unlink()
        index(system, tmp_path / "two")
        assert list(system.graph.to_networkx().nodes) == ["same.py::in_one"]


CHILD = """
import sys
from ai_sleep_constructs.memory.code.system import CodeMemorySystem
with CodeMemorySystem(None, sys.argv[1], embedder=None) as system:
    system.index_file(sys.argv[2])
"""


def test_the_graph_sees_what_others_read(folder, tmp_path):
    with system_of(tmp_path / "c.db") as system, system_of(tmp_path / "c.db") as other:
        index(system, folder)
        assert edges(system.graph) == edges(other.graph) == {("run", "settings_of")}
        (folder / "main.py").write_text("def run(path):\n    return path\n")
        subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "c.db"), str(folder / "main.py")], check=True)
        assert edges(system.graph) == edges(other.graph) == set() and len(system.graph) == 3
        (folder / "main.py").unlink()
        index(other, folder)
        assert len(system.graph) == 2


# The watch


def test_a_watch_outlasts_a_lock(folder, tmp_path):
    with system_of(tmp_path / "c.db") as system:
        index(system, folder)
        system.store.connections.busy_seconds = 0.05  # of the connections that other threads open from now on

        def known():
            return {one["metadata"]["name"] for one in system.get_all_memories()}

        with closing(sqlite3.connect(tmp_path / "c.db", isolation_level=None)) as writer:
            with system.watch(folder):
                time.sleep(0.3)
                writer.execute("BEGIN IMMEDIATE")
                (folder / "alpha.py").write_text("def while_locked():\n    return 1\n")
                (folder / "beta.py").unlink()
                time.sleep(1)
                writer.execute("ROLLBACK")
                until(lambda: known() == {"while_locked", "run"})
                (folder / "main.py").write_text("def afterwards():\n    return 1\n")
                until(lambda: known() == {"while_locked", "afterwards"})
            watcher = system.watch(folder)
            time.sleep(0.3)
            writer.execute("BEGIN IMMEDIATE")
            (folder / "main.py").write_text("def too_late():\n    return 1\n")
            time.sleep(0.8)
            with pytest.raises(RuntimeError, match="ended early: .* was locked"):
                watcher.stop()
            writer.execute("ROLLBACK")
            watcher.stop()


def test_a_watch_may_be_stopped_by_what_it_calls(folder):
    seen = []

    def enough(change):
        seen.append(change)
        watcher.stop()

    with system_of() as system:
        watcher = system.watch(folder, on_change=enough)
        time.sleep(0.3)
        (folder / "alpha.py").write_text("def once():\n    return 1\n")
        until(lambda: not watcher._thread.is_alive())
        watcher.stop()
        assert len(seen) == 1 and len(system) == 1


# Metadata of one's own


@pytest.mark.parametrize("about", [
    {"entity": "Acme"}, {"modified": 2024}, {"type": "code", "entity": "Acme"}, {"entity": ["a"], "modified": None}, {"session": ["a"]},
    {"type": "code", "entity": "Acme", "qualified_name": 5, "file_path": 7, "start_line": "first", "file_hash": None},
    {"file_path": ["a.py"], "title": 3}, {"qualified_name": 9, "start_line": 1, "end_line": 99},
])
@pytest.mark.parametrize("model", [None, lambda prompt: "8"])
def test_metadata_of_ones_own_is_no_code(folder, about, model):
    options = {} if model is None else {"scoring": "single"}
    with CodeMemorySystem(model, ":memory:", embedder=None, relevance_threshold=0.0, retry_delay=0, **options) as system:
        file = (folder / "alpha.py").as_posix()
        note = system.add_memory("The settings of the company are kept in a safe.", {"session": file, **about})
        made = index(system, folder)
        context = CodeContext("where are the settings?", current_file=file, accessed_files=[file], errors=f'File "{file}", line 3, in settings_of')
        found = system.retrieve_relevant_memories_sync(context, explain=True)
        assert {one.memory_id for one in found} == {note, *made}
        assert not {"dependency", "recency", "frame"} & next(one for one in found if one.memory_id == note).explanation.keys()
        assert "kept in a safe" in system.format_memories_for_prompt(found) and "  1 | def settings_of" in system.format_memories_for_prompt(found)
        system.prompt_tokens = 30
        system.format_memories_for_prompt(found)
        stats = system.get_stats()
        assert (stats["total_code_memories"], stats["total_non_code_memories"]) == (len(made), 1)
        system.sleep_sync()
        system.reindex_file(file)
        assert system.get_memory(note) is not None and len(system) == len(made) + 1


# Stack frames


def test_a_filter_holds_for_stack_frames_too(folder):
    with system_of() as system:
        index(system, folder)
        context = CodeContext("what failed?", errors=f'File "{folder}/alpha.py", line 3, in settings_of')
        found = system.retrieve_relevant_memories_sync(context, where={"session": (folder / "main.py").as_posix()})
        assert [one.metadata["name"] for one in found] == ["run"]


def test_a_long_trace_over_many_files_is_read_quickly(tmp_path):
    with system_of() as system:
        rows = [("default", f"/srv/app/package{i % 40}/module{i}.py", f"m{i}.py", str(i), '["python", [], [], []]') for i in range(1500)]
        with system.store.transaction() as connection:
            connection.executemany("INSERT INTO code_files (namespace, file, path, digest, parsed) VALUES (?, ?, ?, ?, ?)", rows)
        functions = tmp_path / "many.py"
        functions.write_text("".join(f"def f{i}():\n    return {i}\n" for i in range(20)))
        made = system.index_file(functions)
        numbers = [one.number for one in system.store.list() if one.id in made]
        deep = "".join(f'  File "/srv/app/package{i % 40}/module{i % 1500}.py", line {i}, in f\n' for i in range(3000))
        trace = "".join(f'  File "{functions}", line {2 * i + 1}, in f{i}\n' for i in range(20))
        start = time.perf_counter()
        assert system._framed(trace + deep, None) == numbers[:9:-1]
        assert system._framed(deep + trace, None) == numbers[:9:-1]
        assert time.perf_counter() - start < 1.0


# The weights of the search


def test_the_words_of_names_count_more_than_the_text_as_it_is_written(tmp_path):
    (tmp_path / "a.py").write_text("def parse_header(value):\n    return value\n\n\ndef other(value):\n" + "    print('header')\n" * 9 + "    return value\n")
    with system_of() as system:
        system.index_file(tmp_path / "a.py")
        first, *_ = system.candidates.find("header")
        assert system.store.get_many([first.number])[0].metadata["name"] == "parse_header"


class Meaning:
    """Nearness to the question as a text says it of itself."""

    name, size = "meaning", 2

    def encode(self, texts):
        cosines = np.array([0.5 if "wanted thing" in text else 0.0 if "else" in text else 1.0 for text in texts], np.float32)
        return np.stack([cosines, np.sqrt(1 - cosines**2)], 1)


def test_meaning_counts_twice_what_words_do():
    with system_of(embedder=Meaning(), scorer="lexical") as system:
        word, meaning, _ = system.add_memories(["wanted thing", "nearest of all", "something else"])
        assert system.candidates.vectors.wait()
        found = system.store.get_many(one.number for one in system.candidates.find("wanted"))
        assert [one.id for one in found][:2] == [meaning, word]
