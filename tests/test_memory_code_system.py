"""A repository as memories: read once, kept in step, never half-written, and found with what is known around a question."""

import asyncio
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from code_memories import index, until

from ai_sleep_constructs.memory.code.context import CodeContext, code_for_prompt
from ai_sleep_constructs.memory.code.system import CodeMemorySystem, CodeRetrievalConfig

AUTH = '''"""Who may come in."""
from app.tokens import check


def login(user, token):
    """Let a user in whose token is good."""
    return check(token) and remember(user)


def remember(user):
    return user


class Session:
    """What is known of a user who is in."""

    def renew(self):
        return self.until() + 1

    def until(self):
        return 3
'''
TOKENS = '''def check(token):
    """Whether a token is good."""
    return token == "good"


def weather():
    return "rain"
'''
PAGE = "export function showPage(name: string): string { return `<p>${name}</p>`; }\nexport class Page { draw(): void {} }\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    files = {
        "app/auth.py": AUTH, "app/tokens.py": TOKENS, "app/tests/test_auth.py": "def test_login():\n    assert True\n",
        "tests/test_all.py": "def test_all():\n    assert True\n", "web/page.ts": PAGE, "built/made.py": "def made():\n    return 1\n",
        ".gitignore": "built/\n", "notes.txt": "no code", "web/data.py": "x = 1\0",
    }
    for name, text in files.items():
        file = tmp_path / "repository" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "repository"


def answering(rule):
    """A model that follows the form, with `rule` from a memory's quoted text to a score from 0 to 10; `asked` has the texts."""
    def model(prompt):
        blocks = re.findall(r"begin memory (\w+)\]\n(.*?)\n\[\w+ end", prompt, re.S)
        model.asked += [text for _, text in blocks]
        model.prompts += 1
        return json.dumps([{"id": name, "score": rule(text), "reason": "x"} for name, text in blocks])

    model.asked, model.prompts = [], 0
    return model


def system_of(model=None, path=":memory:", **options):
    return CodeMemorySystem(model, path, **{"embedder": None, "enable_recency_boost": False, "retry_delay": 0, **options})


def names(found):
    return [(m.metadata or {}).get("qualified_name") for m in found]


# Defaults


def test_the_documented_defaults_hold_and_are_a_configuration(tmp_path):
    documented = {
        "relevance_threshold": 0.7, "max_memories": 15, "batch_size": 10, "enable_caching": True, "enable_dependency_boost": True,
        "enable_recency_boost": True, "dependency_boost_amount": 0.15, "recency_boost_amount": 0.10, "recency_days": 7, "retry_attempts": 3,
        "retry_delay": 1.0,
    }
    parameters = inspect.signature(CodeMemorySystem).parameters
    assert {name: parameters[name].default for name in documented} == documented
    order = ["small_model_fn", "db_path", "relevance_threshold", "max_memories", "batch_size", "enable_caching", "enable_dependency_boost",
             "enable_recency_boost", "dependency_boost_amount", "recency_boost_amount", "recency_days", "retry_attempts", "retry_delay"]
    assert list(parameters)[: len(order)] == order and parameters["db_path"].default == "code_memories.db"
    with CodeMemorySystem(answering(lambda text: 5), tmp_path / "c.db", **documented) as system:
        system.update_retrieval_config(**documented)
        stats = system.get_stats()
        assert {name: stats[name] for name in documented} == documented and documented.items() <= stats["retrieval_config"].items()
        assert {"total_code_memories", "total_non_code_memories", "total_memories", "total_files", "cache_stats"} <= set(stats)
        assert stats["cache_stats"]["size"] == 0 and stats["total_memories"] == 0
    assert [field.name for field in dataclasses.fields(CodeRetrievalConfig)][:5] == [
        "relevance_threshold", "max_memories", "batch_size", "retry_attempts", "retry_delay"]


@pytest.mark.parametrize("options", [
    {"relevance_threshold": 1.5}, {"max_memories": 0}, {"dependency_boost_amount": 2}, {"recency_boost_amount": -0.1}, {"recency_days": 0},
    {"enable_caching": 1}, {"enable_dependency_boost": "yes"}, {"prompt_tokens": 0}, {"count_tokens": 5},
])
def test_bad_settings_are_named_before_there_is_a_file(tmp_path, options):
    (name,) = options
    with pytest.raises((ValueError, TypeError), match=name):
        CodeMemorySystem(None, tmp_path / "c.db", **{"embedder": None, **options})
    assert not list(tmp_path.iterdir())


def test_settings_change_at_run_time_all_or_none():
    with system_of() as system:
        system.update_retrieval_config(recency_days=30, dependency_boost_amount=0.3, max_memories=3, enable_caching=False)
        before = system.get_stats()["retrieval_config"]
        assert before["recency_days"] == 30 and before["dependency_boost_amount"] == 0.3 and before["enable_caching"] is False
        with pytest.raises(ValueError, match="recency_boost_amount"):
            system.update_retrieval_config(max_memories=9, recency_boost_amount=7)
        with pytest.raises(ValueError, match="did you mean dependency_boost_amount"):
            system.update_retrieval_config(max_memories=9, dependency_boost_amout=0.1)
        assert system.get_stats()["retrieval_config"] == before


# Reading files


def test_a_file_gives_its_entities_once_however_it_is_named(repository, monkeypatch):
    with system_of() as system:
        made = system.index_file(repository / "app/auth.py")
        stored = system.get_memories_by_file(repository / "app/auth.py")
        assert [m["id"] for m in stored] == made and len(set(made)) == 5
        assert names_of(stored) == ["login", "remember", "Session", "Session.renew", "Session.until"]
        first = stored[0]["metadata"]
        assert first["signature"] == "def login(user, token)" and first["docstring"] == "Let a user in whose token is good."
        assert (first["start_line"], first["end_line"], first["kind"], first["language"]) == (5, 7, "function", "python")
        assert AUTH.splitlines()[4:7] == first["body"].splitlines() and len(first["file_hash"]) == 64
        monkeypatch.chdir(repository / "app")
        (repository / "alias.py").symlink_to(repository / "app/auth.py")
        for name in ("auth.py", "./auth.py", "../app/auth.py", repository / "alias.py"):
            again = system.index_file(str(name))
            assert len(again) == 5 and not set(again) & set(made)
        new = index(system, repository)
        assert system.last_indexed.unchanged == 1  # the file that was read by name, not one of another name
        places = [(m["metadata"]["session"], m["metadata"]["start_line"], m["metadata"]["qualified_name"]) for m in system.get_all_memories()]
        assert len(places) == len(set(places)) == 5 + len(new)


def names_of(memories):
    return [m["metadata"].get("qualified_name") for m in memories]


def test_what_cannot_be_read_as_code_is_refused_and_changes_nothing(repository):
    with system_of() as system:
        system.index_file(repository / "app/tokens.py")
        before = system.get_all_memories()
        for path, error in (("missing.py", FileNotFoundError), ("app", FileNotFoundError), ("notes.txt", ValueError), ("web/data.py", ValueError)):
            for method in (system.index_file, system.reindex_file):
                with pytest.raises(error):
                    method(str(repository / path))
        for folder in ("missing", "app/auth.py"):
            with pytest.raises(NotADirectoryError):
                index(system, repository / folder)
        assert system.get_all_memories() == before


def test_a_broken_file_is_read_as_far_as_it_goes(repository):
    (repository / "app/broken.py").write_text("def whole():\n    return 1\n\ndef half(:\n    return (\n\nclass After:\n    def last(self):\n        return 2\n")
    with system_of() as system:
        system.index_file(repository / "app/broken.py")
        assert {"whole"} <= set(names_of(system.get_all_memories()))


def test_a_repository_is_read_once_and_then_only_what_changed(repository):
    with system_of() as system:
        made = index(system, repository, ["tests/*", "*.ts"])
        files = {m["metadata"]["session"].removeprefix(f"{repository}/") for m in system.get_all_memories()}
        assert files == {"app/auth.py", "app/tokens.py", "app/tests/test_auth.py"}  # the pattern is matched from the root
        assert system.last_indexed.skipped.keys() == {"web/data.py"} and len(made) == len(system)
        kept = {m["id"] for m in system.get_all_memories()}
        assert index(system, repository, ["tests/*", "*.ts"]) == [] and system.last_indexed.files == 0 and system.last_indexed.unchanged == 3
        os.utime(repository / "app/auth.py", (1, 1))  # another time is no other content
        (repository / "app/tokens.py").write_text(TOKENS + "\ndef more():\n    return 2\n")
        (repository / "app/tests/test_auth.py").unlink()
        new = index(system, repository, ["tests/*", "*.ts"])
        assert len(new) == 3 and (system.last_indexed.files, system.last_indexed.removed) == (1, 1)
        now = {m["id"] for m in system.get_all_memories()}
        assert now - kept == set(new) and system.get_memories_by_file(repository / "app/tests/test_auth.py") == []
        assert index(system, repository, ["*/tests/*"], gitignore=False) != []
        assert {"made", "showPage", "Page.draw"} <= set(names_of(system.get_all_memories()))
        assert not {"test_all", "test_login"} & set(names_of(system.get_all_memories()))


def test_only_the_folder_itself_when_not_recursive_and_other_folders_stay(repository):
    with system_of() as system:
        index(system, repository / "web")
        index(system, repository / "app", recursive=False)
        assert "test_login" not in names_of(system.get_all_memories()) and "Page" in names_of(system.get_all_memories())
        index(system, repository / "app")
        index(system, repository / "app", recursive=False)
        assert "test_login" in names_of(system.get_all_memories())  # not gone, only not looked at


CHILD = """
import os, sys
from pathlib import Path
from ai_sleep_constructs.memory.code.system import CodeMemorySystem
file, number = Path(sys.argv[2]), int(sys.argv[3])
with CodeMemorySystem(None, sys.argv[1], embedder=None) as system:
    while True:
        number += 1
        file.write_text("".join(f"def f{i}():\\n    return {number}\\n\\n\\n" for i in range(20 + number % 7)))
        assert len(system.reindex_file(file)) == 20 + number % 7
        os.write(1, f"{number}\\n".encode())
"""


def test_ten_kills_while_reindexing_leave_one_whole_version_of_the_file(tmp_path):
    file, base, number, midway = tmp_path / "many.py", tmp_path / "c.db", 0, 0
    for kill in range(10):
        command = [sys.executable, "-c", CHILD, str(base), str(file), str(number)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(3):
            line = child.stdout.readline()
            assert line, child.communicate()[1]
            number = int(line)
        time.sleep(0.003 * kill)
        child.kill()
        rest = child.communicate()[0].split()
        number = int(rest[-1]) if rest else number
        with CodeMemorySystem(None, base, embedder=None) as system:
            memories = system.get_memories_by_file(file)
            (version,) = {int(m["metadata"]["body"].split()[-1]) for m in memories}  # of one version, and not of two
            assert version in (number, number + 1) and len(memories) == len(system) == 20 + version % 7
            assert {m["metadata"]["file_hash"] for m in memories} == set(system.index.digests().values())
            assert len(system.graph.to_networkx()) == len(memories) and system.store.integrity_check() == []
            midway += version == number
        number = version
    assert midway


def test_a_failure_while_reindexing_leaves_the_file_as_it_was(repository, monkeypatch):
    with system_of() as system:
        made = system.index_file(repository / "app/auth.py")
        (repository / "app/auth.py").write_text(AUTH + "\n\ndef more():\n    return 1\n")
        monkeypatch.setattr(system.store, "add_many", lambda items: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            system.reindex_file(repository / "app/auth.py")
        monkeypatch.undo()
        assert [m["id"] for m in system.get_memories_by_file(repository / "app/auth.py")] == made and "more" not in str(system.graph.to_networkx().nodes)
        assert len(system.reindex_file(repository / "app/auth.py")) == 6


def test_the_graph_outlives_the_object(repository, tmp_path):
    def edges(system):
        return sorted((a.split("::")[-1], b.split("::")[-1]) for a, b in system.graph.to_networkx().edges)

    with system_of(path=tmp_path / "c.db") as system:
        index(system, repository)
        first = edges(system)
        login = system.get_memories_by_file(repository / "app/auth.py")[0]["metadata"]["entity"]
        assert any("check" in one for one in system.graph.callees(login)) and any("remember" in one for one in system.graph.callees(login))
    with system_of(path=tmp_path / "c.db") as system:
        assert edges(system) == first and first
        assert index(system, repository) == [] and len(system) > 5
        (repository / "app/auth.py").write_text(AUTH.replace("and remember(user)", ""))
        system.reindex_file(repository / "app/auth.py")
        assert any("check" in one for one in system.graph.callees(login)) and not any("remember" in one for one in system.graph.callees(login))


def test_a_watched_folder_stays_in_step(repository):
    seen = []
    with system_of() as system:
        index(system, repository)
        with pytest.raises(NotADirectoryError):
            system.watch(repository / "missing")
        with system.watch(repository, ["tests/*"], on_change=seen.append) as watcher:
            time.sleep(0.3)
            (repository / "app/tokens.py").write_text("def renamed():\n    return 1\n")
            (repository / "tests/test_all.py").write_text("def not_looked_at():\n    return 1\n")
            (repository / "built/made.py").write_text("def ignored():\n    return 1\n")
            (repository / "web/page.ts").unlink()
            until(lambda: "renamed" in names_of(system.get_all_memories()) and "Page" not in names_of(system.get_all_memories()))
        watcher.stop()
        found = set(names_of(system.get_all_memories()))
        assert "renamed" in found and not {"Page", "check", "not_looked_at", "ignored"} & found
        assert sum(one.removed for one in seen) == 1 and sum(len(one.ids) for one in seen) >= 1
        (repository / "app/tokens.py").write_text("def after_the_end():\n    return 1\n")
        time.sleep(0.3)
        assert "after_the_end" not in names_of(system.get_all_memories())


# Notes


def test_notes_are_kept_beside_the_code_of_their_file_and_outlive_its_reindexing(repository):
    with system_of(relevance_threshold=0.0) as system:
        file = repository / "app/auth.py"
        made = system.index_file(file)
        told = system.add_documentation_memory("Tokens", "They end after a day.", file_path=str(file), metadata={"section": "security", "type": "code"})
        mended = system.add_debugging_session("login fails", "AttributeError: no id", "check for None", str(file))
        piece = system.add_code_memory("SELECT tokenValue FROM sessions", str(file))
        loose = system.add_documentation_memory("Release", "Tag it.", "process")
        assert [m["id"] for m in system.get_memories_by_file(file)] == [*made, told, mended, piece]
        about = system.get_memory(told)["metadata"]
        assert about["section"] == "security" and about["type"] == "documentation" and (about["title"], about["category"]) == ("Tokens", "documentation")
        assert "check for None" in system.get_memory(mended)["text"] and system.get_memory(mended)["metadata"]["error"] == "AttributeError: no id"
        assert system.get_memory(loose)["metadata"]["category"] == "process"
        system.add_memory("A note of one's own", {"type": "code", "session": file.as_posix()})
        new = system.reindex_file(file)
        assert [m["id"] for m in system.get_memories_by_file(file)][:3] == [told, mended, piece] and len(new) == 5
        stats = system.get_stats()
        assert (stats["total_code_memories"], stats["total_non_code_memories"], stats["total_memories"], stats["total_files"]) == (5, 5, 10, 1)
        found = system.retrieve_relevant_memories_sync("token value of the sessions")
        assert len(found) == 10 and found[0].memory_id == piece  # found by the parts of tokenValue
        assert "Tag it." in system.format_memories_for_prompt(found)


@pytest.mark.parametrize(("call", "word"), [
    (lambda s: s.add_documentation_memory("", "x"), "title"), (lambda s: s.add_documentation_memory("x", None), "content"),
    (lambda s: s.add_debugging_session("x", " ", "x"), "error"), (lambda s: s.add_debugging_session("x", "x", ""), "solution"),
    (lambda s: s.add_code_memory(""), "text"), (lambda s: s.add_documentation_memory("x", "x", metadata=5), "metadata"),
    (lambda s: s.add_memory("", {"type": "code"}), "text"),
])
def test_notes_without_a_text_are_refused(call, word):
    with system_of() as system:
        with pytest.raises((ValueError, TypeError), match=word):
            call(system)
        assert len(system) == 0


# Scores and boosts


def test_callers_and_callees_of_strong_hits_pass_the_threshold_after_boosts(repository):
    def rule(text):
        return 7 if "function login " in text else 6

    with system_of(answering(rule)) as system:
        index(system, repository)
        found = system.retrieve_relevant_memories_sync("how does one get in?", explain=True)
        assert set(names(found)) == {"login", "remember", "check"} and names(found)[0] != "login"
        assert {m.metadata["name"]: round(m.relevance_score, 6) for m in found} == {"login": 0.7, "remember": 0.75, "check": 0.75}
        assert found[0].explanation["dependency"] == 0.15 and "dependency +0.15" in found[0].reasoning
        system.update_retrieval_config(dependency_boost_amount=0.05)
        assert names(system.retrieve_relevant_memories_sync("how does one get in?")) == ["login"]
        system.update_retrieval_config(dependency_boost_amount=0.15, enable_dependency_boost=False)
        assert names(system.retrieve_relevant_memories_sync("how does one get in?")) == ["login"]


@pytest.mark.parametrize(("hits", "gain"), [(1, {"check", "remember"}), (2, {"check", "remember", "until"})])
def test_only_callers_and_callees_of_the_best_gain(repository, hits, gain):
    scores = {"function login ": 9, "Session.renew": 8, "Session.until": 5}
    with system_of(answering(lambda text: next((score for name, score in scores.items() if name in text), 4)), relevance_threshold=0.5) as system:
        index(system, repository)
        system.update_retrieval_config(dependency_boost_hits=hits)
        found = system.retrieve_relevant_memories_sync("how does one get in?", explain=True)
        assert {m.metadata["name"] for m in found if "dependency" in m.explanation} == gain


def test_what_was_changed_lately_gains_and_scores_end_at_one(repository):
    old, days = time.time() - 20 * 86400, 86400
    os.utime(repository / "app/tokens.py", (old, old))
    os.utime(repository / "app/auth.py", (time.time() - 3 * days,) * 2)
    with system_of(answering(lambda text: 10 if "login" in text else 6), enable_recency_boost=True, enable_dependency_boost=False) as system:
        index(system, repository, ["tests/*", "*/tests/*", "web/*"])
        scores = {m.metadata["name"]: (m.relevance_score, m.explanation) for m in system.retrieve_relevant_memories_sync("x y z", explain=True)}
        assert scores["login"][0] == 1.0 and scores["login"][1]["recency"] == 0.1
        assert abs(scores["remember"][0] - 0.7) < 1e-9 and "check" not in scores
        system.update_retrieval_config(recency_days=30)
        assert "check" in names(system.retrieve_relevant_memories_sync("x y z"))
        system.update_retrieval_config(recency_days=2)
        assert names(system.retrieve_relevant_memories_sync("x y z")) == ["login"]
        system.update_retrieval_config(recency_days=30, enable_recency_boost=False)
        assert names(system.retrieve_relevant_memories_sync("x y z")) == ["login"]


def test_boosts_that_reach_one_leave_the_order_of_the_scores(repository):
    model = answering(lambda text: 10 if "renew" in text and "class" not in text else 9)
    with CodeMemorySystem(model, ":memory:", embedder=None, max_memories=3, recency_boost_amount=1.0, enable_dependency_boost=False) as system:
        system.index_repository(repository, progress=False)
        found = system.retrieve_relevant_memories_sync("what?")
        assert [one.relevance_score for one in found] == [1.0] * 3 and found[0].metadata["name"] == "renew"


def test_what_one_is_working_on_gains(repository):
    with system_of(answering(lambda text: 6), relevance_threshold=0.0, enable_dependency_boost=False) as system:
        index(system, repository, ["tests/*", "*/tests/*"])
        context = CodeContext("what is this?", current_file=str(repository / "app/auth.py"), accessed_files=[str(repository / "app/tokens.py"),
                              str(repository / "app/auth.py")], errors=f'File "{repository}/app/auth.py", line 17, in renew\n  at app/tokens.py:2')
        found = {m.metadata["qualified_name"]: m.explanation for m in system.retrieve_relevant_memories_sync(context, explain=True)}
        boosts = {name: {key: parts[key] for key in ("frame", "current_file", "accessed_file") if key in parts} for name, parts in found.items()}
        assert boosts["Session.renew"] == {"frame": 0.2, "current_file": 0.05} and boosts["Session"] == {"current_file": 0.05}
        assert boosts["check"] == {"frame": 0.2, "accessed_file": 0.03} and boosts["weather"] == {"accessed_file": 0.03}
        assert boosts["showPage"] == {}
        system.update_retrieval_config(frame_boost_amount=0.0, current_file_boost_amount=0.4)
        assert set(names(system.retrieve_relevant_memories_sync(context))[:5]) == {"login", "remember", "Session", "Session.renew", "Session.until"}


def test_a_frame_is_among_the_candidates_however_many_memories_there_are(repository):
    many = repository / "many.py"
    many.write_text("".join(f"def question_{i}(answer):\n    return answer\n\n\n" for i in range(200)) + "def hidden():\n    return 1 / 0\n")
    with system_of(answering(lambda text: 1), max_candidates=20, relevance_threshold=0.0, max_memories=50) as system:
        index(system, repository)
        error = f'Traceback:\n  File "{many}", line 802, in hidden\nZeroDivisionError'
        assert "hidden" not in names(system.retrieve_relevant_memories_sync("question answer"))
        found = system.retrieve_relevant_memories_sync(CodeContext("question answer", errors=error))
        assert names(found)[0] == "hidden" and len(found) <= 20
        for path, there in ((f"/home/me/{many.parent.name}/many.py", True), ("many.py", True), ("/usr/lib/python3.11/many.py", False)):
            found = system.retrieve_relevant_memories_sync(CodeContext("question answer", errors=error.replace(str(many), path)), explain=True)
            assert ["hidden" for m in found if "frame" in m.explanation] == ["hidden"] * there, path  # a traceback of another machine, and one of another project


# The cache


def test_the_hash_of_a_file_is_in_the_key_only_when_asked_for(repository):
    model = answering(lambda text: 8)
    with system_of(model) as system:
        index(system, repository)

        def asked(hashes):
            model.asked.clear()
            system.retrieve_relevant_memories_sync("who comes in?", hashes)
            return len(model.asked)

        everything = len(system)
        assert asked(True) == everything and asked(True) == 0
        assert asked(False) == everything and asked(False) == 0
        (repository / "app/auth.py").write_text("import os\n\n" + AUTH + "\n\ndef other():\n    return 9\n")  # all else has moved by two lines
        system.reindex_file(repository / "app/auth.py")
        assert asked(False) == 1 and asked(True) == 6 and asked(True) == 0
        assert system.get_stats()["cache_stats"]["size"] > 0 and system.clear_cache() > 0 and asked(True) == everything + 1
        system.update_retrieval_config(enable_caching=False, batch_size=3)
        assert asked(True) == asked(True) == everything + 1
        system.update_retrieval_config(enable_caching=True)
        assert asked(True) == 0
    with system_of(model, enable_caching=False) as system:
        index(system, repository)
        assert asked(True) == asked(True) == everything + 1 and system.get_stats()["cache_stats"]["size"] == 0


# The prompt


@pytest.mark.parametrize(("template", "word"), [
    ("{query} {code} {files}", "files"), ("{query} only", "code"), ("{code}", "query"), ("{query} {code} {", "{{"), ("{query} {code} {0}", "0"),
    ("{query.__class__} {code}", "query.__class__"), ("{} {query} {code}", "placeholders|none of"), (5, "custom_prompt_template"),
])
def test_a_template_is_checked_before_anything_is_asked(repository, template, word):
    model, primary = answering(lambda text: 8), answering(lambda text: 8)
    with system_of(model) as system:
        index(system, repository)
        with pytest.raises((ValueError, TypeError), match=word):
            system.query_sync("who comes in?", primary, template)
        assert model.prompts == primary.prompts == 0


def test_the_model_is_given_the_code_with_its_lines(repository):
    with system_of(answering(lambda text: 9 if "renew" in text or "login" in text else 1), enable_dependency_boost=False) as system:
        index(system, repository, ["*/tests/*"])
        context = CodeContext("How is {it} renewed?", recent_changes="renew was moved")
        prompt = asyncio.run(system.query(context, lambda prompt: prompt, "Q={query} C={context} {{x}}\n{code}"))
        assert prompt.startswith("Q=How is {it} renewed? C=Recent changes: renew was moved {x}\n") and "weather" not in prompt
        for number in (5, 6, 7, 17):
            assert f"{number:>5} | {AUTH.splitlines()[number - 1].strip()}" in prompt.replace(" |     ", " | ").replace(" |     ", " | ")
        assert prompt.count("def renew") == 1  # with its class, and not once more by itself
        assert "How is {it} renewed?" in system.query_sync(context, lambda prompt: prompt)
        with pytest.raises(RuntimeError, match="out of order"):
            system.query_sync(context, failing)


async def failing(prompt):
    raise RuntimeError("out of order")


@pytest.mark.parametrize("budget", [1, 12, 40, 90, 200])
def test_the_code_stays_within_the_budget_as_it_is_counted(repository, budget):
    def by_words(text):
        by_words.called += 1
        return len(text.split())

    by_words.called = 0
    (repository / "app/long.py").write_text("def long_one(value):\n" + "    value += 1\n" * 300 + "    return value\n")
    with system_of(answering(lambda text: 9), prompt_tokens=budget, count_tokens=by_words) as system:
        index(system, repository)
        found = system.retrieve_relevant_memories_sync("anything")
        shown = system.format_memories_for_prompt(found)
        assert len(shown.split()) <= budget and by_words.called and (shown or budget < 12)
        assert "value += 1" not in shown
        if budget == 200:
            assert "def long_one(value)  [lines 1-302, body left out]" in shown and shown.count("=== ") == len(set(re.findall("=== .*", shown)))


def test_lines_are_counted_as_editors_count_them(repository):
    text = 'def odd():\n    a = "\\f"\n\x0c    b = "\u2028"\n    return a + b\n'
    (repository / "odd.py").write_text(text, encoding="utf-8")
    with system_of(answering(lambda text: 9)) as system:
        system.index_file(repository / "odd.py")
        shown = code_for_prompt(system.retrieve_relevant_memories_sync("odd"))
        assert "    4 |     return a + b" in shown and "    5 |" not in shown
