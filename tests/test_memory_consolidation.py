"""A night of the text memory: said once, contradictions pointed out, the least used let go, and all of it taken back."""

import asyncio
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ai_sleep_constructs.memory.calls import CallLimitError
from ai_sleep_constructs.memory.contradictions import contradiction, differ
from ai_sleep_constructs.memory.embedding import VectorIndex
from ai_sleep_constructs.memory.journal import Journal
from ai_sleep_constructs.memory.planning import ConsolidationConfig, Planner
from ai_sleep_constructs.memory.store import MemoryStore
from ai_sleep_constructs.memory.system import MemorySystem


def quiet(model=None, path=":memory:", **options):
    return MemorySystem(model, path, near_duplicate=None, **{"embedder": None, "retry_delay": 0.0, **options})


def note(id, text, day=1, **metadata):
    return {"id": id, "text": text, "timestamp": f"2026-01-{day:02}T12:00:00+00:00", "metadata": metadata or None}


RENT = "The rent of the flat is 500 euros a month."


def notes():
    return [
        note("a", RENT, 1, source="mail"),
        note("b", RENT.lower(), 2, speaker=None, tags=["x"]),
        note("c", "The rent of the flat is now 600 euros a month.", 3),
        note("d", "Our dog is called Rex.", 4),
        note("e", "The guest network of the cabin is called Lakeside.", 5),
    ]


def everything(system):
    return system.store.list()


def test_duplicates_are_merged_and_their_sources_kept():
    with quiet() as system:
        system.add_memories(notes())
        system.store.touch([1, 1])
        system.store.touch([1])
        report = system.sleep_sync()
        kept = system.get_memory("b")  # equally full, later
        assert system.get_memory("a") is None and kept["text"] == RENT.lower() and kept["metadata"]["tags"] == ["x"]
        assert kept["metadata"]["sources"] == [{"id": "a", "timestamp": "2026-01-01T12:00:00.000000+00:00", "metadata": {"source": "mail"}}]
        assert system.store.get("b").uses == 2
        assert report["merged"] == 1 and report["ids"]["merged"] == {"b": ["a"]} and (report["before"], report["after"]) == (5, 4)
        assert report["bytes_before"] > 0 and system.history("a")[0]["text"] == RENT
        system.add_memories([note("f", RENT, 6, source="call")])
        system.sleep_sync()
        again = system.get_memory("f")["metadata"]
        assert [source["id"] for source in again["sources"]] == ["a", "b"] and again["source"] == "call"
        assert len(system) == 4 and system.sleep_sync()["id"] is None  # nothing left to do, and nothing written


def test_the_fuller_text_stays_and_the_number_of_sources_is_bounded():
    with quiet() as system:
        base = "the committee agreed to paint the old harbour gate dark green before the summer fair and to ask the school choir to sing"
        system.add_memories([note("full", base + " there", 1), *(note(f"n{day}", base, day) for day in range(2, 12))])
        report = system.sleep_sync(max_sources=4)
        metadata = system.get_memory("full")["metadata"]
        assert report["merged"] == 10 and [source["id"] for source in metadata["sources"]] == ["n8", "n9", "n10", "n11"]
        assert metadata["sources_left_out"] == 6
        system.revert_consolidation()
        assert len(system) == 11 and system.get_memory("full")["metadata"] is None


def test_what_says_something_else_is_never_merged():
    pairs = [
        ("The meeting is on Monday at ten.", "The meeting is on Tuesday at ten."), (RENT, RENT.replace("500", "600")),
        ("Dana likes tea with milk and sugar.", "Dana does not like tea with milk and sugar."),
        ("I write all of it in C for the old machine.", "I write all of it in C++ for the old machine."),
        ("We sail from the harbour of Brest at dawn.", "We sail from the harbour of Cadiz at dawn."),
        ("It is -5 degrees at the weather station.", "It is 5 degrees at the weather station."),
    ]
    for one, two in pairs:
        assert differ(one, two)
        with quiet() as system:
            system.add_memories([one, two, "Something else."])
            report = system.sleep_sync(near_duplicate=0.3, least_alike=0.3)
            assert report["merged"] == 0 and len(system) == 3
    with quiet() as system:  # nor what two people said of themselves
        system.add_memories([(RENT, {"speaker": "Ann"}), (RENT, {"speaker": "Bob"}), (RENT, {"speaker": "Ann"})])
        assert system.sleep_sync()["merged"] == 1 and len(system) == 2


def test_a_chain_does_not_become_one_cluster():
    with quiet() as system:
        words = [f"word{chr(97 + n)}" for n in range(26)]
        system.add_memories([note(f"n{start}", " ".join(words[start : start + 12]), start + 1) for start in range(12)])
        report = system.sleep_sync(6, half_life_days=1.0)
        assert report["merged"] and all(abs(int(kept[1:]) - int(one[1:])) <= 3 for kept, ones in report["ids"]["merged"].items() for one in ones)


def test_contradictions_are_flagged_on_both_and_the_flags_go_with_their_reason():
    with quiet() as system:
        system.add_memories(notes())
        report = system.sleep_sync()
        assert report["flagged"] == 1 and report["ids"]["flagged"] == [["c", "b", "another number: 500, then 600"]]
        assert system.get_memory("c")["metadata"]["contradicts"] == [{"id": "b", "reason": "another number: 500, then 600"}]
        assert system.get_memory("b")["metadata"]["contradicted_by"][0]["id"] == "c"
        assert system.get_memory("d")["metadata"] is None and len(system) == 4
        system.update_memory("c", text="The rent of the flat is paid.")
        assert system.sleep_sync()["flagged"] == 0
        assert "contradicted_by" not in system.get_memory("b")["metadata"]
        system.store.update("c", text="The rent of the flat is now 600 euros a month.")
        assert system.sleep_sync(contradictions=False)["flagged"] == 0
    with quiet() as system:  # the date that was given counts, not the order of adding
        system.add_memories([(RENT.replace("500", "600"), {"date": "2026-05-01"}), (RENT, {"date": "2026-01-01"})])
        system.sleep_sync()
        assert "contradicts" in everything(system)[0].metadata


def test_a_series_of_one_pattern_is_no_heap_of_contradictions():
    with quiet() as system:
        system.add_memories([f"The reading of the water meter is {n} litres." for n in range(100, 130)])
        report = system.sleep_sync()
        assert report["flagged"] == report["merged"] == 0 and report["series"] == 30
    assert contradiction("I bought 3 pears at the market.", "I bought 5 pears at the market.") is None


def test_over_the_budget_the_least_used_and_oldest_go_first():
    things = ["tide tables", "bread", "chess", "granite", "otters", "violins"]
    with quiet() as system:
        system.add_memories([note(f"n{day}", f"A remark about {thing}.", day) for day, thing in enumerate(things, 1)])
        system.store.touch([1])
        system.store.touch([1, 2])
        report = system.sleep_sync(3)
        assert report["ids"]["dropped"] == ["n3", "n4", "n5"] and {memory.id for memory in everything(system)} == {"n1", "n2", "n6"}
        assert system.history("n3")[0]["text"] == "A remark about chess."
        assert system.sleep_sync(0.5)["after"] == 1 and system.sleep_sync(0.01)["after"] == 1


def model(answer="They spoke about the harbour wall."):
    async def write(prompt):
        write.prompts.append(prompt)
        if write.fails:
            raise ConnectionError("refused")
        assert not write.busy()
        return answer

    write.prompts, write.fails, write.busy = [], False, lambda: False
    return write


HARBOUR = [
    "The harbour wall of Brest is built of granite.", "Granite for the harbour wall of Brest came by ship.", "Nobody pays for the harbour wall of Brest.",
    "Tomatoes need warm soil.", "Tomatoes need water in warm soil.", "Basil likes warm soil as tomatoes do.", "A clock stands there.",
]


def test_summaries_name_their_sources_and_are_asked_for_once():
    write = model()
    with quiet(write) as system:
        ids = system.add_memories([(text, {"session": "s"}) for text in HARBOUR])
        write.busy = lambda: system.store.connections.get().in_transaction
        report = asyncio.run(system.sleep(summarise=True))
        made = {frozenset(of): system.get_memory(id) for id, of in report["ids"]["summarised"].items()}
        assert set(made) == {frozenset(ids[:3]), frozenset(ids[3:6])} and len(write.prompts) == report["summarised"] == 2
        assert all(memory["metadata"] == {"session": "s", "summary_of": [id for id in ids if id in of]} for of, memory in made.items())
        assert all(f"begin memory {n}]" in write.prompts[0] for n in (1, 2, 3)) and len(system) == 9
        assert system.sleep_sync(summarise=True)["id"] is None and len(write.prompts) == 2
        system.add_memory("The harbour wall of Brest has a crack.", {"session": "s"})
        report = system.sleep_sync(summarise=True)
        assert report["summarised"] == report["replaced"] == 1 and len(write.prompts) == 3 and len(system) == 10
        system.revert_consolidation(report["id"])
        assert len(system) == 10 and system.get_memory(report["ids"]["replaced"][0]) is not None


def test_a_model_that_fails_changes_nothing_and_calls_are_bounded():
    write = model()
    with quiet(write) as system:
        system.add_memories([*HARBOUR, HARBOUR[0]])
        before, write.fails = everything(system), True
        with pytest.raises(ConnectionError, match="refused"):
            system.sleep_sync(3, summarise=True)
        with pytest.raises(CallLimitError, match="max_calls=1"):
            system.sleep_sync(3, summarise=True, max_calls=1)
        assert everything(system) == before and system.consolidations() == []
        write.fails, count = False, len(write.prompts)
        assert system.sleep_sync(summarise=True, max_calls=1)["summarised"] == 1 and len(write.prompts) == count + 1
    with quiet(model(" ")) as system:
        system.add_memories(HARBOUR)
        with pytest.raises(ValueError, match="with nothing"):
            system.sleep_sync(summarise=True)
        assert len(system) == 7


def test_all_of_it_is_reverted_also_after_a_restart(tmp_path: Path):
    path, write = tmp_path / "m.db", model()
    with quiet(write, path) as system:
        system.add_memories([*notes(), *HARBOUR])
        system.store.touch([1, 3])
        before = everything(system)
        first = system.sleep_sync(9, summarise=True)
        assert first["merged"] and first["dropped"] and first["flagged"] and first["summarised"]
        between = everything(system)
        second = system.sleep_sync(4)
        assert second["after"] == 4
    with quiet(write, path) as system:
        assert [entry["id"] for entry in system.consolidations()] == [second["id"], first["id"]]
        assert system.consolidations()[1]["ids"] == first["ids"]
        with pytest.raises(ValueError, match=f"revert {second['id']} first"):
            system.revert_consolidation(first["id"])
        system.revert_consolidation()
        assert everything(system) == between
        assert system.revert_consolidation(first["id"])["left"] == [] and everything(system) == before
        assert system.store.integrity_check() == [] and all(entry["reverted"] for entry in system.consolidations())
        for id, message in ((first["id"], "reverted already"), (99, "no consolidation"), (None, "no consolidation to revert")):
            with pytest.raises(ValueError, match=message):
                system.revert_consolidation(id)


def test_reverting_keeps_what_was_changed_since():
    with quiet() as system:
        system.add_memories(notes())
        system.store.touch([2, 3])
        report = system.sleep_sync(3)
        assert report["ids"]["dropped"] == ["d"]
        system.update_memory("b", text="The rent is settled.", metadata={**system.get_memory("b")["metadata"], "mine": 1})
        system.store.add("Another dog.", id="d")
        system.delete_memory("c")
        system.store.delete("a", erase=True)
        out = system.revert_consolidation()
        assert out["left"] == ["d"] and out["erased"] == 1 and out["restored"] == 0
        assert system.get_memory("b")["text"] == "The rent is settled." and system.get_memory("b")["metadata"] == {"tags": ["x"], "speaker": None, "mine": 1}
        assert system.get_memory("a") is system.get_memory("c") is None and system.get_memory("d")["text"] == "Another dog."


def test_what_others_change_while_it_plans_is_left_alone():
    write = model()
    with quiet(write) as system:
        system.add_memories([*notes(), *HARBOUR])

        def meanwhile():
            def change():
                system.update_memory("a", text="Other.")
                system.add_memory("New.")
                system.store.connections.get().close()

            if len(write.prompts) == 1:
                thread = threading.Thread(target=change)
                thread.start()
                thread.join()
            return False

        write.busy = meanwhile
        report = system.sleep_sync(summarise=True)
        assert report["changed_meanwhile"] == 1 and report["merged"] == 0 and system.get_memory("a")["text"] == "Other."
        assert report["after"] == 12 + 1 + report["summarised"]


class Meaning:
    """Vectors by hand: texts that begin alike mean the same."""

    name, size = "by-hand", 8

    def encode(self, texts):
        return np.stack([np.random.default_rng(sum(text[:6].encode())).standard_normal(8) for text in texts]).astype(np.float32)


def test_with_vectors_what_is_worded_otherwise_is_merged_too():
    texts = ["Boats leave when the tide turns.", "Boats depart at the change of the water.", "Otters sleep on their backs.", "Chess is slow."]
    for embedder, merged in ((None, 0), (Meaning(), 1)):
        with quiet(embedder=embedder) as system:
            system.add_memories(texts)
            assert embedder is None or system.candidates.vectors.wait()
            assert system.sleep_sync()["merged"] == merged and len(system) == 4 - merged
    with quiet(embedder=Meaning()) as system:  # vectors that have read the turn before as well do not say that two turns mean the same
        system.add_memories([(text, {"session": "s"}) for text in ["How are you?", *texts[:2]]])
        assert system.candidates.vectors.wait() and set(system.candidates.vectors.alone()) == {1}
        assert system.sleep_sync()["merged"] == 0


def test_arguments_that_cannot_be_used_are_refused():
    with quiet() as system:
        system.add_memories(notes())
        for budget in (0, -1, 1.5, True, "3"):
            with pytest.raises(ValueError, match="budget"):
                system.sleep_sync(budget)
        for options, message in (
            ({"summarise": True}, "small_model_fn"), ({"near_duplicate": 0}, "near_duplicate"), ({"least_alike": 0.95}, "least_alike"),
            ({"max_calls": 0}, "max_calls"), ({"cluster_size": 2}, "cluster_size"), ({"apart": "speaker"}, "apart"), ({"half_life_days": float("inf")}, "half_life"),
        ):
            with pytest.raises(ValueError, match=message):
                system.sleep_sync(**options)
        with pytest.raises(TypeError, match="no_such"):
            system.sleep_sync(no_such=1)
        assert len(system) == 5


def test_namespaces_sleep_for_themselves(tmp_path: Path):
    with quiet(path=tmp_path / "m.db", namespace="one") as one, quiet(path=tmp_path / "m.db", namespace="two") as two:
        for system in (one, two):
            system.add_memories(notes())
        saved = one.snapshot()
        assert one.sleep_sync()["merged"] == 1 and len(two) == 5 and two.consolidations() == []
        two.sleep_sync()
        one.restore(saved)
        assert len(one) == 5 and len(two) == 4


def test_thousands_of_memories():
    rng = np.random.default_rng(0)
    words = np.array([f"w{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{chr(97 + n // 676)}" for n in range(17000)])
    weights = 1 / np.arange(2, 17002)
    originals = rng.choice(words, (2_000, 12), p=weights / weights.sum())
    texts = [" ".join(row) for row in originals]
    with quiet() as system:
        system.add_memories(texts + [text.upper() + "!" for text in texts])
        report = system.sleep_sync(1_600)
        assert report["merged"] >= 2_000 and report["after"] == 1_600
        assert system.revert_consolidation()["restored"] == 2_400 and len(system) == 4_000


def planned(store):
    journal, config = Journal(store), ConsolidationConfig(contradictions=False)
    memories, since = journal.read()
    return journal, (memories, since, Planner(memories, config).plan(), config)


def pairs(count):
    texts = [f"Remark about the colour of door {chr(97 + n % 26)}{chr(97 + n // 26)}x in the old town hall." for n in range(count)]
    return texts + [text.upper() for text in texts]


def test_a_consolidation_that_is_killed_half_way_has_not_happened(tmp_path: Path):
    path = tmp_path / "m.db"
    code = """if True:
        import os, sys
        sys.path.insert(0, sys.argv[2])
        from test_memory_consolidation import Journal, MemoryStore, planned
        store = MemoryStore(sys.argv[1])
        store.connections.get().execute("PRAGMA cache_size = 10")  # what is changed goes to the journal of the file at once
        Journal._add_uses = staticmethod(lambda *arguments: os.kill(os.getpid(), 9))  # when memories are deleted and others changed
        journal, arguments = planned(store)
        journal.apply(*arguments)"""
    with MemoryStore(path) as store:
        store.add_many(pairs(400))
        before = store.list()
        for _ in range(2):
            store.connections.rows("PRAGMA wal_checkpoint(TRUNCATE)")
            assert subprocess.run([sys.executable, "-c", code, str(path), str(Path(__file__).parent)], check=False).returncode == -9
            assert path.with_name("m.db-wal").stat().st_size > 100_000
            assert store.list() == before and store.integrity_check() == [] and Journal(store).entries() == []
            store.add("Another writer does not wait.", id="other")
            assert store.delete("other")
        journal, arguments = planned(store)
        report = journal.apply(*arguments)
        assert report["merged"] == 400 and report["after"] == 400 and store.integrity_check() == []
        assert journal.revert(report["id"])["restored"] == 400 and store.list() == before and store.integrity_check() == []


def test_merging_many_writes_the_index_once_for_hundreds_of_them():
    """In rows: 23 for a merge when the index was written after each; the lock for writing was held four times as long."""
    with MemoryStore(":memory:") as store:
        store.add_many(pairs(600))
        journal, arguments = planned(store)
        connection = store.connections.get()
        written = connection.total_changes
        report = journal.apply(*arguments)
        merging, written = connection.total_changes - written, connection.total_changes
        assert report["merged"] == 600 and merging < 8 * 600, merging / 600
        assert journal.revert(report["id"])["restored"] == 600
        assert connection.total_changes - written < 8 * 600, (connection.total_changes - written) / 600


@pytest.mark.parametrize("after", [(1.0,), (1.5, 1.0)], ids=["kept", "rolled back"])
def test_a_whole_night(after):
    from ai_sleep_constructs import AISleepController, OptimizationStrategy, SleepMode, SleepTrigger
    from ai_sleep_constructs.sleep.state import LMModelState
    from ai_sleep_constructs.sleep.strategies.base import SleepContext, run_transaction
    from ai_sleep_constructs.sleep.strategies.semantic_consolidation import SemanticConsolidation

    class Guard:
        def __init__(self):
            self.bits = [1.0, *after]

        def bits_per_byte(self, model):
            return self.bits.pop(0)

    with quiet() as system:
        system.add_memories(notes())
        before = everything(system)
        context = SleepContext(LMModelState("m"), object(), guard=Guard(), stores={"notes": system})
        report = run_transaction(SemanticConsolidation(memory_budget=0.6, rehearsal_steps=0), context)
        if len(after) > 1:
            assert report.status == "rolled_back", report
            assert everything(system) == before and system.consolidations()[0]["reverted"]
            return
        assert report.status == "committed" and len(system) == 3 and report.details["consolidated"] == 1, report
        night = report.details["memories"]["notes"]
        assert (night["merged"], night["dropped"], night["flagged"]) == (1, 1, 0) and "ids" not in night and json.dumps(night)
        system.revert_consolidation(night["id"])
        assert everything(system) == before
        controller = AISleepController("m")
        controller.configure_deep_sleep(strategies=[OptimizationStrategy.SEMANTIC_CONSOLIDATION], memory_budget=4, rehearsal_steps=0)
        controller.rebind(stores={"notes": system})
        controller.initiate_sleep(SleepTrigger.MANUAL, SleepMode.DEEP_SLEEP)
        assert controller.last_report.strategies[0].status == "committed" and len(system) == 4
        assert system.get_memory("c")["metadata"]["contradicts"]


@pytest.mark.parametrize("way", ["revert", "sleep"])
def test_a_memory_brought_back_is_read_again_by_the_one_after_it(way):
    read = []

    class Reading:
        name, size = "reading", 2

        def encode(self, texts):
            read.extend(texts)
            return np.ones((len(texts), 2), np.float32)

    with quiet() as system:
        store = system.store
        store.add_many([note("a", "Ann: hello", 1, session="s"), note("b", "The cabin is far.", 2, session="s"), note("c", "Then stay.", 3, session="s")])
        with VectorIndex(store, Reading(), background=False) as index:
            index.make()
            store.touch([1, 3])
            if way == "revert":
                store.delete("b")
            else:
                assert system.sleep_sync(2)["ids"]["dropped"] == ["b"]
            assert index.make() == 1 and read[-1].startswith("Then stay.") and read[-1].endswith("hello")
            assert store.revert("b", store.history("b")[0]["version"]) if way == "revert" else system.revert_consolidation()["restored"] == 1
            assert index.make() == 2 and sorted(read[-2:])[1].endswith("The cabin is far.") and read[-1].startswith("Then stay.")


@pytest.mark.parametrize("key", ["sources", "sources_left_out", "contradicts", "contradicted_by", "summary_of", "sleep_sources"])
@pytest.mark.parametrize("value", [["a", "b"], "wiki", 5, None, [], {"a": 1}, [{"id": "x"}], True])
def test_what_a_user_keeps_under_our_keys_stays(key, value):
    if (key, value) in (("sources_left_out", 5), ("summary_of", ["a", "b"])):
        pytest.skip("of the shape that is ours")

    async def model(prompt):
        return "The rent is discussed."

    with quiet(model) as system:
        mine = {key: value}
        system.add_memories([note(f"n{day}", RENT, day, **mine, room=day) for day in (1, 2)] + [note("c", RENT.replace("500", "600"), 3, **mine), note("d", "The dog.", 4, **mine)])
        before = everything(system)
        assert system.sleep_sync(summarise=True, max_sources=1)["merged"] == 1
        kept = system.get_memory("n2")["metadata"]
        place = "sleep_sources" if key == "sources" else "sources"
        assert kept[key] == value and kept[place] == [{"id": "n1", "timestamp": before[0].timestamp, "metadata": {"room": 1}}]
        later = system.get_memory("c")["metadata"]
        assert later[key] == value and later["sleep_contradicts" if key == "contradicts" else "contradicts"][0]["id"] == "n2"
        after = everything(system)
        assert system.sleep_sync()["id"] is None and everything(system) == after and system.get_memory("d")["metadata"] == mine
        system.revert_consolidation()
        assert everything(system) == before


def test_what_a_merged_memory_kept_under_our_keys_is_in_its_source():
    with quiet() as system:
        system.add_memories([note("a", RENT, 1, sources="mail", contradicts="nobody"), note("b", RENT, 2)])
        system.sleep_sync()
        (source,) = system.get_memory("b")["metadata"]["sources"]
        assert source["metadata"] == {"sources": "mail", "contradicts": "nobody"}
        system.add_memories([note("c", RENT, 3, sources=["own"])])
        system.sleep_sync()
        metadata = system.get_memory("c")["metadata"]
        assert metadata["sources"] == ["own"] and [one["id"] for one in metadata["sleep_sources"]] == ["a", "b"]
        system.update_memory("c", metadata={**metadata, "sources": ["mine now"]})
        system.revert_consolidation()
        assert system.get_memory("c")["metadata"] == {"sources": ["mine now"]} and len(system.get_memory("b")["metadata"]["sources"]) == 1
