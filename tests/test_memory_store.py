"""The store under faults: killed writers, several processes and threads, broken and newer files, and a model of what it holds."""

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ai_sleep_constructs.memory import connections as connections_module
from ai_sleep_constructs.memory.connections import Connections, StoreError, execute_rows
from ai_sleep_constructs.memory.schema import MIGRATIONS
from ai_sleep_constructs.memory.store import MemoryStore
from ai_sleep_constructs.memory.transfer import INSERT

HEAD = "import os, sys\nfrom ai_sleep_constructs.memory.store import MemoryStore\n"


@pytest.fixture
def store(tmp_path: Path):
    with MemoryStore(tmp_path / "memories.db") as store:
        yield store


def child(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", HEAD + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def matching(store: MemoryStore, word: str) -> list[int]:
    sql = "SELECT rowid FROM memories_text WHERE memories_text MATCH ? ORDER BY rowid"
    return [number for (number,) in store.connections.get().execute(sql, (f'"{word}"',))]


# Faults


@pytest.mark.parametrize("durability", ["normal", "full"])
def test_killed_writers_lose_nothing_that_was_acknowledged(tmp_path: Path, durability: str) -> None:
    """Five kills for each durability; an id is acknowledged when the child has written it to its pipe after the add."""
    code = """if True:
        store = MemoryStore(sys.argv[1], durability=sys.argv[2])
        for number in range(1_000_000):
            if number % 10 == 9:
                ids = store.add_many([f"many {number} {i}" for i in range(5)])
            elif number % 10 == 4:
                store.update(ids[0], text=f"changed {number}")
                continue
            else:
                ids = [store.add(f"single {number}", {"session": number % 7, "speaker": "Ada"})]
            os.write(1, ("".join(id + "\\n" for id in ids)).encode())"""
    acknowledged: set[str] = set()
    lines = random.Random(durability)
    for _ in range(5):
        process = child(code, tmp_path / "m.db", durability)
        assert process.stdout is not None
        for _ in range(lines.randrange(50, 400)):
            acknowledged.add(process.stdout.readline().strip())
        process.kill()
        rest = process.stdout.read().split("\n")
        acknowledged.update(rest[:-1])
        process.communicate()
    acknowledged.discard("")
    with MemoryStore(tmp_path / "m.db") as store:
        kept = {memory.id for memory in store.list()}
        assert len(acknowledged) > 500 and acknowledged <= kept
        assert store.integrity_check() == []
        assert len(matching(store, "single")) + len(matching(store, "many")) + len(matching(store, "changed")) == store.count()
        many = [memory for memory in store.list() if memory.text.startswith("many") or memory.text.startswith("changed")]
        assert len(many) >= 5


def test_four_processes_write_and_read_without_an_error(tmp_path: Path) -> None:
    code = """if True:
        me = sys.argv[2]
        with MemoryStore(sys.argv[1], busy_seconds=30) as store:
            for number in range(60):
                id = store.add(f"one of {me}", {"session": me})
                ids = store.add_many([f"more of {me}"] * 3)
                assert store.update(id, text=f"other of {me}") and store.delete(ids[0])
                store.touch([memory.number for memory in store.list({"session": me}, limit=2)])
                assert store.get(id).text == f"other of {me}" and store.count({"session": me}) == number + 1
                assert len(store.history(id)) == 1"""
    processes = [child(code, tmp_path / "m.db", f"p{place}") for place in range(4)]  # none of them found a file
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    with MemoryStore(tmp_path / "m.db") as store:
        assert store.count() == 4 * 60 * 3 and store.integrity_check() == []
        assert len(matching(store, "other")) == 240 and matching(store, "one") == []


def test_threads_share_a_store_and_a_dead_thread_leaves_no_connection(store: MemoryStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(store.add, [f"text {number}" for number in range(200)]))
    assert len(set(ids)) == store.count() == 200
    for _ in range(20):
        thread = threading.Thread(target=store.count)
        thread.start()
        thread.join()
    assert len(store.connections._all) < 12


def test_a_fork_opens_its_own_connection(store: MemoryStore) -> None:
    store.add("of the parent")
    pid = os.fork()
    if pid == 0:
        try:
            store.add("of the child")
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    store.add("of the parent again")
    assert store.count() == 3 and store.integrity_check() == []


def test_a_lock_held_too_long_says_so(store: MemoryStore, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "memories.db", busy_seconds=0.05) as other, store.transaction():
        for write in (lambda: other.add("a"), lambda: other.add_many(["a"]), lambda: other.delete("a")):
            with pytest.raises(StoreError, match=r"locked by another writer for longer than busy_seconds=0\.05"):
                write()
        assert other.count() == 0  # reading does not wait
    assert store.count() == 0


def test_closing_is_safe_twice_and_from_another_thread(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "m.db")
    store.add("a")
    thread = threading.Thread(target=store.close)
    thread.start()
    thread.join()
    store.close()
    for use in (lambda: store.add("b"), store.count, lambda: store.delete("a"), lambda: store.within("n").list()):
        with pytest.raises(StoreError, match="was closed"):
            use()
    assert "closed" in repr(store)
    assert not (tmp_path / "m.db-wal").exists()


# Files that are no store


def test_what_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    text, foreign = tmp_path / "text.db", tmp_path / "foreign.db"
    text.write_text("no database, but long enough to look at: " * 10)
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE memories (something TEXT)")
    connection.close()
    before = text.read_bytes()
    for path, message in [
        (text, "cannot be used as a store: file is not a database"),
        (foreign, "another program"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "m.db", "its folder is not there"),
    ]:
        with pytest.raises(StoreError, match=message):
            MemoryStore(path)
    assert text.read_bytes() == before


def test_a_newer_file_is_refused_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    MemoryStore(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(StoreError, match=f"format {len(MIGRATIONS) + 1}.*up to {len(MIGRATIONS)}"):
        MemoryStore(path)


def test_a_migration_backs_up_first_and_a_failed_one_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    with MemoryStore(path) as store:
        store.add("kept")
    half = ["ALTER TABLE memories ADD COLUMN extra TEXT", "no statement"]
    with pytest.raises(sqlite3.OperationalError):
        Connections(path, [*MIGRATIONS, half])
    backup = tmp_path / f"m.db.bak-v{len(MIGRATIONS)}"
    with MemoryStore(path) as store, MemoryStore(backup) as copy:
        assert [memory.text for memory in store.list()] == [memory.text for memory in copy.list()] == ["kept"]
        assert "extra" not in [row[1] for row in store.connections.get().execute("PRAGMA table_info(memories)")]
    moved = Connections(path, [*MIGRATIONS, half[:1]])
    assert moved.get().execute("SELECT text, extra FROM memories").fetchall() == [("kept", None)]
    moved.close()
    with pytest.raises(StoreError, match="formats up to"):
        MemoryStore(path)
    assert sorted(file.name for file in tmp_path.glob(".*")) == []


def test_a_file_of_the_first_format_is_moved_on_with_its_copy_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    first = Connections(path, MIGRATIONS[:1])
    execute_rows(first.get(), INSERT, [(f"id{n}", "default", f"Old text {n}", '{"speaker":"Ada","n":1}', "2026-01-01", None, 0, None) for n in range(600)])
    first.close()
    with MemoryStore(path) as store:
        assert store.connections.rows("PRAGMA user_version") == [(len(MIGRATIONS),)]
        assert len(matching(store, "old")) == 600 and store.integrity_check() == []
        before = index_of(store)
        assert store.update("id3", metadata={"speaker": "Ada", "n": 2}) and index_of(store) == before and len(store.history("id3")) == 1
        assert store.update("id3", text="New text") and matching(store, "new") == [4] and 4 not in matching(store, "old")
        store.add_many([f"later {n}" for n in range(600)])
        assert len(matching(store, "later")) == 600 and store.integrity_check() == []
    with contextlib.closing(Connections(f"{path}.bak-v1", MIGRATIONS[:1])) as copy:
        assert copy.rows("SELECT count(*) FROM memories WHERE text LIKE 'Old text%'") == [(600,)] and copy.rows("PRAGMA user_version") == [(1,)]


# What writing costs


def index_of(store: MemoryStore) -> list:
    return store.connections.rows("SELECT id, block FROM memories_text_data ORDER BY id")


def test_what_is_not_in_the_index_does_not_rewrite_it(store: MemoryStore) -> None:
    store.add_many([(f"a text of many words {n}", {"speaker": 1, "n": n}) for n in range(20)])
    id = store.list()[7].id
    before = index_of(store)
    store.update(id, metadata={"speaker": 1, "n": 7, "sources": ["a"]})
    assert index_of(store) == before and [row["metadata"] for row in store.history(id)] == [{"speaker": 1, "n": 7}]
    for changes in ({"metadata": {"speaker": 1.0}}, {"metadata": {"speaker": "1.0"}}, {"metadata": {"date": "2026"}}, {"text": "other"}):
        before = index_of(store)
        assert store.update(id, **changes) and store.integrity_check() == []
        assert index_of(store) != before or changes == {"metadata": {"speaker": "1.0"}}, changes
    assert matching(store, "other") == matching(store, "2026") == [8] and len(store.history(id)) == 5
    store.words = lambda text, metadata: "added"
    assert store.update(id, text="other") and matching(store, "added") == [8] and store.integrity_check() == []


def test_a_small_write_is_a_few_small_pages(store: MemoryStore) -> None:
    """With pages of 4 KiB and pieces of the index of the same size it was 52 KiB for each."""
    store.add_many(f"some words before {n}" for n in range(1000))
    connection = store.connections.get()
    connection.execute("PRAGMA wal_autocheckpoint = 0"), connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for number in range(200):
        store.add(f"Turn {number}: we talked about rain and {number}", {"session": number // 20, "speaker": "Ada"})
    size = store.path.with_name("memories.db-wal").stat().st_size
    assert 200 < size / 200 < 26 << 10, size / 200


def test_many_rows_are_written_to_the_index_together(store: MemoryStore) -> None:
    """Three rows for each: the memory, its sizes in the index, the number last given. With a statement for each, parts of the index made it nine."""
    store.add_many([])
    connection = store.connections.get()
    before = connection.total_changes
    ids = store.add_many(f"row {number}" for number in range(1001))
    assert connection.total_changes - before < 3.2 * 1001
    assert [memory.id for memory in store.list()] == ids and len(set(ids)) == 1001
    assert len({memory.timestamp for memory in store.list()}) == 1
    assert len(matching(store, "row")) == 1001 and store.integrity_check() == []
    version = store.version()
    with pytest.raises(ValueError, match="taken"):
        store.add_many([*({"text": "x", "id": f"n{number}"} for number in range(800)), {"text": "x", "id": ids[0]}])
    assert store.version() == version and store.count() == 1001 and store.integrity_check() == []


# What it holds


def test_bad_input_names_the_argument_and_changes_nothing(store: MemoryStore) -> None:
    kept = store.add("kept", {"a": 1}, id="kept")
    version = store.version()
    for text in (None, "", "  \n", 3, b"bytes", ["a"], "\ud800"):
        for use in (store.add, lambda text: store.add_many(["fine", text]), lambda text: store.add_many([(text, None)])):
            with pytest.raises(ValueError, match=r"text|items\[1\]"):
                use(text)
    for metadata in ({"a": {1}}, {"a": float("nan")}, {1: 2}, {"a": "\ud800"}, {"a": b"b"}):
        for use in (lambda metadata: store.add("x", metadata), lambda metadata: store.update("kept", metadata=metadata)):
            with pytest.raises(ValueError, match="metadata"):
                use(metadata)
    with pytest.raises(TypeError, match="metadata"):
        store.add("x", ["a"])
    with pytest.raises(ValueError, match="id: 'kept' is taken"):
        store.add("x", id="kept")
    with pytest.raises(ValueError, match="taken"):
        store.add_many(["new", {"text": "x", "id": "kept"}])
    with pytest.raises(ValueError, match=r"items\[0\]: unknown keys \['txt'\]"):
        store.add_many([{"txt": "x"}])
    with pytest.raises(TypeError, match="items"):
        store.add_many("text")
    with pytest.raises(ValueError, match="timestamp"):
        store.add("x", timestamp="yesterday")
    with pytest.raises(ValueError, match="text"):
        store.update(kept, text=" ")
    for call in (lambda: MemoryStore(durability="some"), lambda: MemoryStore(busy_seconds=-1), lambda: store.list(limit=-1)):
        with pytest.raises(ValueError, match=r"durability|busy_seconds|limit"):
            call()
    assert store.version() == version and store.count() == 1 and store.history("kept") == []


NAMES = st.sampled_from(["a", "b", "c"])
TEXTS = st.text(min_size=1, max_size=20).filter(lambda text: not text.isspace() and not any("\ud800" <= c <= "\udfff" for c in text))
METADATA = st.none() | st.dictionaries(st.sampled_from(["session", "speaker", "x"]), st.none() | st.booleans() | st.integers(-9, 9) | TEXTS)
STEPS = st.one_of(
    st.tuples(st.just("add"), NAMES, TEXTS, METADATA),
    st.tuples(st.just("update"), NAMES, st.none() | TEXTS, METADATA),
    st.tuples(st.just("delete"), NAMES),
    st.tuples(st.just("revert"), NAMES, st.integers(0, 3)),
    st.tuples(st.just("fail"), NAMES, TEXTS),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_any_steps_leave_what_a_dictionary_holds(steps: list) -> None:
    """A dictionary beside the store, the earlier versions in lists; the index is in step after every sequence."""
    with MemoryStore(":memory:") as store:
        here: dict[str, tuple] = {}
        past: dict[str, list] = {"a": [], "b": [], "c": []}
        for step, name, *rest in steps:
            version = store.version()
            before = dict(here)
            if step == "add" and name not in here:
                store.add(*rest, id=name)
                here[name] = tuple(rest)
            elif step == "add":
                with pytest.raises(ValueError, match="taken"):
                    store.add(*rest, id=name)
            elif step == "update":
                assert store.update(name, *rest) is (name in here)
                if name in here:
                    new = tuple(old if value is None else value for value, old in zip(rest, here[name], strict=True))
                    if json.dumps(new) != json.dumps(here[name]):
                        past[name].insert(0, here[name])
                    here[name] = new
            elif step == "delete":
                assert store.delete(name) is (name in here)
                if name in here:
                    past[name].insert(0, here.pop(name))
            elif step == "revert":
                versions = [row for row in store.history(name) if row["text"] is not None]
                if rest[0] < len(versions):
                    assert store.revert(name, versions[rest[0]]["version"])
                    old = past[name][rest[0]]
                    if name in here and json.dumps(here[name]) != json.dumps(old):
                        past[name].insert(0, here[name])
                    here[name] = old
            else:
                with pytest.raises(ZeroDivisionError), store.transaction():
                    store.clear()
                    store.add(rest[0])
                    raise ZeroDivisionError
            assert json.dumps(before) == json.dumps(here) or store.version() > version
            assert {m.id: (m.text, m.metadata) for m in store.list()} == here
            versions = [(row["text"], row["metadata"]) for row in store.history(name) if row["text"] is not None]
            assert versions == past[name]
        assert store.integrity_check() == []


def test_the_index_follows_every_change(store: MemoryStore) -> None:
    id = store.add("The runners were running", {"speaker": "Ada", "date": "2023-05-08"})
    assert matching(store, "run") == matching(store, "ada") == matching(store, "2023-05-08") == [1]
    store.update(id, metadata={"speaker": "Grace"})
    assert matching(store, "ada") == [] and matching(store, "grace") == matching(store, "run") == [1]
    store.update(id, text="walking")
    assert matching(store, "run") == [] and matching(store, "walk") == [1]
    store.touch([1, 1, 99])
    assert store.get(id).uses == 1 and store.get(id).used_at and len(store.history(id)) == 2
    store.clear()
    assert matching(store, "walk") == [] and store.integrity_check() == []
    store.connections.get().execute("INSERT INTO memories_text (rowid, text) VALUES (7, 'out of step')")
    assert store.integrity_check() != []


def test_namespaces_do_not_see_each_other(store: MemoryStore) -> None:
    other = store.within("other")
    store.add("mine", id="a")
    other.add("theirs", id="a")
    assert store.add("also theirs", namespace="other") in [memory.id for memory in other.list()]
    assert store.get("a").text == "mine" and other.get("a").text == "theirs" and store.get_many([1, 2, 3]) == store.list()
    assert store.namespaces() == {"default": 1, "other": 2}
    assert other.update("a", text="changed") and other.delete("a") and store.get("a").text == "mine" and store.history("a") == []
    assert other.clear() == 1 and store.count() == 1


def test_filters_use_the_index_of_a_session(store: MemoryStore) -> None:
    for where in ({"session": "s"}, {"speaker": "s"}, {"date": {"$gte": "2020"}}):
        from ai_sleep_constructs.memory.filters import compile_where

        condition, values = compile_where(where)
        plan = store.connections.get().execute(f"EXPLAIN QUERY PLAN SELECT * FROM memories WHERE namespace = 'd' AND {condition}", values)
        assert f"memories_{next(iter(where))}" in plan.fetchall()[0][3]


def test_neighbours_stay_in_their_session(store: MemoryStore) -> None:
    for turn in range(6):
        store.add(f"a {turn}", {"session": "a"})
        store.add(f"b {turn}", {"session": "b"})
    assert [memory.text for memory in store.neighbours(5, 1, 2)] == ["a 1", "a 3", "a 4"]
    assert [memory.text for memory in store.neighbours(1)] == ["a 1"]


def test_words_are_made_anew_for_every_text(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "m.db", words=lambda text, metadata: text.replace("_", "").swapcase() + " extra") as store:
        id = store.add("parse_file")
        assert matching(store, "PARSEFILE") == matching(store, "extra") == [1]
        store.update(id, text="read_file")
        assert matching(store, "PARSEFILE") == [] and matching(store, "readfile") == [1]
        store.revert(id, store.history(id)[0]["version"])
        assert matching(store, "PARSEFILE") == [1] and store.integrity_check() == []


def test_erased_content_is_nowhere_in_the_file(store: MemoryStore) -> None:
    """Neither metadata nor a word of the text, also of what came and went in one transaction, or was deleted before."""
    store.add_many([f"kept number {number}" for number in range(500)])
    id = store.add("the zebra password", {"secret": "quagga"})
    store.update(id, text="the okapi password")
    assert store.delete(id, erase=True)
    assert [row["text"] for row in store.history(id)] == [None, None] and not store.revert(id, 1)
    before = store.add("a tapir in the garden")
    store.delete(before)
    assert not store.delete(before, erase=True)
    with store.transaction():
        store.delete(store.add("an axolotl in the pond"), erase=True)
    assert store.integrity_check() == [] and len(matching(store, "kept")) == 500
    other = store.within("other")
    other.add("a walrus on the hill"), other.clear(erase=True)
    path = store.path
    store.close()
    content = path.read_bytes()
    for word in (b"quagga", b"zebra", b"okapi", b"password", b"tapir", b"axolotl", b"walrus"):
        assert word not in content and word[1:] not in content, word


def test_erased_words_are_not_left_in_an_index_of_one_piece(store: MemoryStore) -> None:
    with store.transaction():
        store.delete(store.add("an axolotl in the pond"), erase=True)
    path = store.path
    store.close()
    assert b"xolotl" not in path.read_bytes()


def test_vectors_of_the_second_format_are_made_anew(tmp_path: Path) -> None:
    """They are of bare texts, and those of the third format read who speaks."""
    path = tmp_path / "m.db"
    second = Connections(path, MIGRATIONS[:2])
    execute_rows(second.get(), INSERT, [("a", "default", "text", '{"speaker":"Ada"}', "2026-01-01", None, 0, None)])
    second.get().execute("INSERT INTO embedders (name, size) VALUES ('bags', 2)")
    second.get().execute("INSERT INTO vectors (embedder, number, vector) VALUES (1, 1, x'00000000')")
    second.close()
    with MemoryStore(path) as store:
        assert store.connections.rows("SELECT count(*) FROM vectors") == [(0,)] and store.count() == 1


def test_near_duplicates_are_found_among_many(store: MemoryStore) -> None:
    store.add_many([f"the report number {number} was sent to the committee" for number in range(300)])
    id = store.add("Grace prefers tea without sugar in the morning", id="tea")
    assert store.near_duplicates("grace prefers tea without sugar in the morning!") == [(id, 1.0)]
    assert store.near_duplicates("Grace prefers coffee without sugar in the morning") == []
    ((found, likeness),) = store.near_duplicates("Grace prefers coffee without sugar in the morning", 0.5)
    assert found == id and 0.5 < likeness < 0.9
    assert store.near_duplicates('"" AND ( OR *') == [] and store.within("other").near_duplicates("tea without sugar", 0.1) == []


# Transfer


def test_a_store_comes_back_whole_from_its_lines(store: MemoryStore, tmp_path: Path) -> None:
    ids = store.add_many([("first", {"n": 1}), ("second\nline \u2028 end", None), "gone", {"text": "dated", "timestamp": "2020-01-01"}])
    store.update(ids[0], text="first again")
    store.touch([1, 2])
    store.delete(ids[2])
    path = tmp_path / "out.jsonl"
    path.write_text("an older file")
    assert store.export_jsonl(path) == 3
    with MemoryStore(tmp_path / "new.db") as new:
        assert new.import_jsonl(path) == 3
        assert [(m.as_dict(), m.uses, m.used_at) for m in new.list()] == [(m.as_dict(), m.uses, m.used_at) for m in store.list()]
        for id in ids:
            drop = [{**row, "version": 0, "at": row["at"][:22]} for row in new.history(id)]
            assert drop == [{**row, "version": 0, "at": row["at"][:22]} for row in store.history(id)]
        assert new.revert(ids[2], new.history(ids[2])[0]["version"]) and new.get(ids[2]).text == "gone"
        again = tmp_path / "again.jsonl"
        assert store.import_jsonl(path) == 0 and store.export_jsonl(again) == 3 and again.read_bytes() == path.read_bytes()
        assert new.integrity_check() == []
    assert store.export_jsonl(path, {"n": 1}) == 1 and len(path.read_text().splitlines()) == 1


def test_importing_over_what_is_here(store: MemoryStore, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    store.add("mine", id="a")
    path.write_text('{"id": "a", "text": "theirs"}\n\n{"id": "b", "text": "new", "metadata": {"x": [1]}}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl:1: the id 'a' is here already"):
        store.import_jsonl(path, "error")
    assert store.count() == 1
    assert store.import_jsonl(path) == 1 and store.get("a").text == "mine"
    assert store.import_jsonl(path, "replace") == 2 and store.get("a").text == "theirs"
    assert [row["text"] for row in store.history("a")] == ["mine"]
    with pytest.raises(ValueError, match="on_conflict: 'merge'"):
        store.import_jsonl(path, "merge")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"text": "no id"}',
        '{"id": "c"}',
        '{"id": "c", "text": ""}',
        '{"id": "c", "text": "t", "metadata": []}',
        '{"id": "c", "text": "t", "uses": -1}',
        '{"id": "c", "text": "t", "timestamp": 3}',
        '{"id": "c", "text": "t", "more": 1}',
        '{"id": "c", "text": "t", "history": [{"action": "burn"}]}',
        '{"id": "c", "text": "t", "metadata": {"a": NaN}}',
        "[" * 100_000,
    ],
)
def test_a_broken_line_is_named_and_nothing_is_imported(store: MemoryStore, tmp_path: Path, line: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": "a", "text": "fine"}\n' + line + "\n")
    with pytest.raises((ValueError, TypeError), match=r"in\.jsonl:2"):
        store.import_jsonl(path)
    assert store.count() == 0


def test_every_write_moves_the_version_and_reading_does_not(store: MemoryStore) -> None:
    seen = [store.version()]

    def moved() -> bool:
        seen.append(store.version())
        return seen[-1] > seen[-2]

    id = store.add("a")
    assert moved()
    store.touch([1]), store.list(), store.near_duplicates("a")
    assert not moved()
    for write in (lambda: store.update(id, text="b"), lambda: store.delete(id), lambda: store.revert(id, 1), lambda: store.clear(erase=True)):
        write()
        assert moved()
    assert connections_module.DURABILITY.keys() == {"normal", "full"}


def test_closing_while_other_threads_work_is_an_error_for_them_and_no_crash(tmp_path: Path) -> None:
    code = """if True:
        import threading, time
        from ai_sleep_constructs.memory.connections import StoreError
        with MemoryStore(sys.argv[1]) as store:
            store.add_many(f"text {number}" for number in range(2000))
        said = []
        def work(store):
            try:
                while True:
                    store.count({"x": None}), store.list(limit=50), store.add("more")
            except StoreError as error:
                said.append(str(error))
        for place in range(40):
            store = MemoryStore(sys.argv[1])
            threads = [threading.Thread(target=work, args=(store,)) for _ in range(3)]
            [thread.start() for thread in threads]
            time.sleep(0.001 * (place % 10))
            store.close()
            [thread.join() for thread in threads]
        assert len(said) == 120 and all(text.endswith("was closed") for text in said), said"""
    process = child(code, tmp_path / "m.db")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
