"""The shipped experiments through the command line: what they leave behind, and that a seed repeats them exactly."""

import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import torch
from ai_sleep_constructs.cmr.logit_cache import LogitCache, contexts_of
from ai_sleep_constructs.cmr.tensor_buffer import TensorBuffer
from ai_sleep_constructs.workbench.experiments import experiment_paths, find_experiment
from ai_sleep_constructs.workbench.runs import find_finished

SHORT = {
    "batches": 3, "batch_tokens": 96, "every": 3, "deep_every": 1, "guard_sequences": 3, "guard_tokens": 128,
    "recalibration_steps": 2, "rehearsal_steps": 2, "cache_megabytes": 2.0, "kv_cache_retention": 128, "max_regression": 0.2,
}


def run(name: str, output: Path, **parameters: object) -> subprocess.CompletedProcess[str]:
    "The command line in a process of its own."
    pairs = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    command = [sys.executable, "-m", "ai_sleep_constructs.workbench.cli", "run", name, *pairs, "--output", str(output)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    "The folders of two short runs of sleep_schedule with the same seed."
    folders = []
    for name in ("first", "second"):
        output = tmp_path_factory.mktemp(name)
        done = run("sleep_schedule", output, **SHORT)
        assert done.returncode == 0, done.stderr
        assert "report.html" in done.stdout
        (finished,) = find_finished(output)
        folders.append(Path(getattr(finished, "folder", finished)))
    return folders


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_the_same_seed_gives_the_same_metrics(twice: list[Path]) -> None:
    first, second = map(result, twice)
    assert first["metrics"] == second["metrics"] and first["run_id"] == second["run_id"]
    numbers = [v for v in first["metrics"].values() if isinstance(v, float)]
    assert len(numbers) > 20 and len(set(numbers)) > 15
    timeless = ["schedule", "batch", "domain", "bits_per_byte", "cache_bytes", "nights"]
    tables = [pd.read_parquet(folder / "tables" / "batches.parquet")[timeless] for folder in twice]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_the_folder_is_whole(twice: list[Path]) -> None:
    folder = twice[0]
    record = result(folder)
    assert record["parameters"]["batches"] == 3 and record["seed"] == 0
    assert {"versions", "hardware", "git", "preset"} <= set(record)
    figures = list((folder / "figures").glob("*.html"))
    assert len(figures) >= 3
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert report.count("Plotly.newPlot") >= 3 and "https://cdn" not in report
    nbformat.validate(nbformat.read(folder / "sleep_schedule.ipynb", 4))


def test_sleep_did_something(twice: list[Path]) -> None:
    metrics = result(twice[0])["metrics"]
    nights = pd.read_parquet(twice[0] / "tables" / "nights.parquet")
    assert metrics["never_nights"] == metrics["restart_nights"] == 0 < metrics["every_nights"]
    assert metrics["every_peak_cache_MB"] < metrics["never_peak_cache_MB"]
    worked = set(nights.loc[nights["status"] != "skipped", "strategy"])
    assert worked == {
        "kv_cache_management", "security_patching", "attention_head_pruning", "semantic_consolidation", "layer_norm_recalibration",
    }
    assert set(nights["trigger"]) >= {"manual", "memory_pressure"}
    assert (nights["status"] == "committed").any()
    assert metrics["every_parameters"] < metrics["never_parameters"]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"model": "no-such-model"}, ["no-such-model", "reference"]),
        ({"schedules": "never,sometimes"}, ["sometimes", "trigger"]),
        ({"kv_cache_policy": "oldest"}, ["kv_cache_policy", "recency"]),
    ],
)
def test_bad_values_are_one_clear_message(tmp_path: Path, parameters: dict, words: list[str]) -> None:
    done = run("sleep_schedule", tmp_path, **parameters)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not find_finished(tmp_path) and not list(tmp_path.rglob("result.json"))


def test_every_experiment_has_both_presets() -> None:
    for name in experiment_paths():
        experiment = find_experiment(name)
        assert {"quick", "full"} <= set(experiment.presets), name
        assert "seed" in experiment.parameters, name


# The other experiments, as short as they can be. What they find in so little time says little, so that only such findings
# are asked about as hold by construction or by far.

BRIEF: dict[str, dict[str, object]] = {
    "adaptive_learning_rate": {"steps": 40, "seeds": 1, "adamw_rates": "0.001,0.004", "hidden": 32, "batch_tokens": 128},
    "drift_calibration": {"kinds": "normal,t3,ar0.7", "streams": 2, "length": 800, "control_streams": 1},
    "monitoring_benchmark": {
        "kinds": "normal", "streams": 2, "peer_streams": 1, "length": 1000, "change_streams": 1, "labelled_streams": 1, "labelled_length": 1600,
        "updates": 1500, "memory_points": 2000,
    },
    "architectures": {"families": "gpt2,qwen3", "steps": 8, "recalibration_steps": 2, "sequences": 4},
    "cmr_cost": {"memories": 300, "tokens": 128, "wide_hidden": 0, "rounds": 1, "searched": "300", "stream_tokens": 1000},
    "cmr_retrieval_ablation": {
        "arms": "none,cache,both,random,projection", "files": 1, "most_tokens": 600, "calibration_files": 1, "calibration_tokens": 800,
        "evictions": "fifo", "budgets": "", "memories": 300, "least_tokens": 4000, "strategies": "hierarchical,random", "layer_sets": "5",
    },
    "cmr_recall": {
        "arms": "none,both,random", "files": 1, "most_tokens": 1000, "calibration_files": 1, "calibration_tokens": 800, "memories": 300,
        "lengths": "400,800", "fall_to": 800, "planted_arms": "none,both", "planted_lengths": "200,600", "facts": 2, "seeds": 2,
        "count_every": 400,
    },
    "code_memory": {"entities": 150, "questions": 20, "seeds": 1, "scored": 3, "rounds": 1},
    "consolidation_memories": {"facts": 24, "seeds": 1, "sizes": "1.0,0.5"},
    "consolidation_weights": {"arms": "naive,replay", "steps": 4, "seeds": 1, "tokens": 64, "test_sequences": 4},
    "gradient_clipping": {"steps": 24, "seeds": 1, "hidden": 32, "batch_tokens": 128, "arms": "none,global", "spikes": 2},
    "head_pruning": {"seeds": 2, "random_draws": 2, "guard_sequences": 2, "length": 128, "timing_repeats": 1, "decode_tokens": 2},
    "kv_cache": {"policies": "key_diff,random", "tasks": 2, "seeds": 1, "bits": "8", "recents": "0.0", "context": 256},
    "layer_norm_recalibration": {"damages": "pruned", "arms": "distil", "steps": 4, "seeds": 1, "sequences": 8, "test_sequences": 4},
    "memory_scoring": {
        "sizes": "200", "conversations": 2, "questions": 10, "embedder": "none", "paragraphs": 120, "rescored": 2, "likely": 0, "scales": "100,1000",
        "scale_questions": 3,
    },
    "online_service": {"arms": "queue,naive", "requests": 10, "seeds": 1, "new_tokens": 4, "recalibration_steps": 1},
    "security_patching": {"models": "llama", "faults": "nan_weight,bit_flip,foreign_hook", "seeds": 1, "train_steps": 8},
    "strategy_ablation": {
        "strategies": "attention_head_pruning,semantic_consolidation", "seeds": 1, "day_tokens": 256, "sequences": 2, "tokens": 128,
        "rehearsal_steps": 1,
    },
}


@pytest.fixture(scope="module", params=sorted(BRIEF))
def brief(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    "The folder of one short run of each experiment."
    output = tmp_path_factory.mktemp(request.param)
    done = run(request.param, output, **BRIEF[request.param])
    assert done.returncode == 0, done.stderr[-3000:]
    (finished,) = find_finished(output)
    return request.param, Path(getattr(finished, "folder", finished))


def test_each_experiment_leaves_a_whole_folder(brief: tuple[str, Path]) -> None:
    name, folder = brief
    record = result(folder)
    numbers = [v for v in record["metrics"].values() if isinstance(v, (int, float))]
    assert record["experiment"] == name and len(numbers) >= 5
    assert list((folder / "figures").glob("*.html")) and list((folder / "tables").glob("*.parquet"))
    assert "Plotly.newPlot" in (folder / "report.html").read_text(encoding="utf-8")


def test_no_experiment_is_forgotten_here() -> None:
    assert set(BRIEF) | {"sleep_schedule"} == set(experiment_paths())


def test_the_ablation_reports_every_dimension_in_one_table(brief: tuple[str, Path]) -> None:
    name, folder = brief
    if name != "cmr_retrieval_ablation":
        pytest.skip("of another experiment")
    table = pd.read_parquet(folder / "tables" / "arms.parquet").set_index("arm")
    assert {"way_in", "strategy", "scorer", "eviction", "layers", "budget", "bits_per_byte", "change", "error", "tokens_per_second", "megabytes"} <= set(table)
    assert {"attention by hierarchical", "attention by random", "layers 5 attention", "layers 5 random", "fifo 256 kept"} <= set(table.index)
    assert table.loc["layers 5 random", "layers"] == "5" and table.loc["attention by random", "layers"] == "3,4,5"
    readings = pd.read_parquet(folder / "tables" / "readings.parquet")
    bits = readings.groupby("arm")["bits"].sum()  # the change is that over all bytes, as the bits per byte are
    assert all(abs(table.loc[arm, "change"] - (bits[arm] / bits["none"] - 1)) < 1e-9 for arm in table.index)
    assert any(column.startswith("recall_") for column in table)


def test_random_memories_of_the_recall_experiment_differ_only_in_which_are_recalled() -> None:
    notebook = nbformat.read(find_experiment("cmr_recall").path, 4)
    source = next(cell.source for cell in notebook.cells if "class RandomCache" in cell.source).split("class NGrams")[0]
    made: dict[str, object] = {"LogitCache": LogitCache, "TensorBuffer": TensorBuffer, "torch": torch, "seed": 0}
    exec(source, made)
    draw = torch.Generator().manual_seed(0)
    ids, states, logits = torch.randint(50, (40,), generator=draw), torch.randn(40, 16, generator=draw), torch.randn(40, 50, generator=draw)
    caches, contexts = (LogitCache(16, 100, neighbours=4), made["RandomCache"](16, 100, neighbours=4)), contexts_of(ids)  # type: ignore[operator]
    first, other = (cache.mix(logits, states, ids, contexts) for cache in caches)
    assert torch.equal(first, other) and not torch.equal(first, logits)  # without memories the piece votes alike
    for cache in caches:
        cache.remember(states[:-1], ids[1:], torch.arange(39), contexts=contexts[:-1])
    best, drawn = (cache.votes(states[:5]) for cache in caches)
    assert best.similarity.shape == drawn.similarity.shape == (5, 4)
    assert float(best.similarity[:, 0].min()) > 0.999 > 0.7 > float(drawn.similarity.mean())


CONVERSATION = {
    "session_1_date_time": "1:56 pm on 8 May, 2023",
    "session_1": [
        {"speaker": "Ann", "dia_id": "D1:1", "text": "How was the zoo?"},
        {"speaker": "Bob", "dia_id": "D1:2", "text": "We saw a giraffe."},
    ],
    "session_2": [{"speaker": "Ann", "dia_id": "D2:1", "text": "I sold the piano."}],
}
QUESTIONS = [
    {"question": "What did Ann sell?", "evidence": ["D2:1"], "category": 1},
    {"question": "What did Bob see at the zoo?", "evidence": ["D1:1; D1:2"], "category": 4},
    {"question": "Of whom is the photo?", "evidence": ["D9:9"], "category": 1},
    {"question": "What did Ann see?", "evidence": ["D1:2"], "category": 5, "adversarial_answer": "a giraffe"},
]


def cells_of_memory_scoring(*starts: str) -> dict[str, Any]:
    "What the cells of the experiment that begin with one of these define."
    made: dict[str, Any] = {"json": json, "re": re, "Path": Path, "itertools": itertools}
    for cell in nbformat.read(find_experiment("memory_scoring").path, 4).cells:
        if cell.source.startswith(starts):
            exec(cell.source.split("\nmemories, asked =")[0], made)
    return made


@pytest.mark.parametrize("form", ["nested", "flat", "lists", "objects"])
def test_a_file_of_conversations_is_read_in_each_of_its_forms(tmp_path: Path, form: str) -> None:
    sessions: Any = [CONVERSATION["session_1"], CONVERSATION["session_2"]]
    if form == "objects":
        sessions = [{"date_time": CONVERSATION["session_1_date_time"], "turns": sessions[0]}, {"turns": sessions[1]}]
    held: dict[str, Any] = {"nested": {"conversation": CONVERSATION}, "flat": dict(CONVERSATION)}.get(form, {"sessions": sessions})
    path = tmp_path / "given.json"
    path.write_text(json.dumps([{**held, "qa": QUESTIONS}]))
    ((memories, asked),), left_out = cells_of_memory_scoring("def read_conversations")["read_conversations"](path)
    assert [memory["id"] for memory in memories] == ["D1:1", "D1:2", "D2:1"] and left_out == 2
    assert [memory["metadata"]["session"] for memory in memories] == ["session_1", "session_1", "session_2"]
    assert form == "lists" or [memory["metadata"].get("date") for memory in memories] == ["1:56 pm on 8 May, 2023"] * 2 + [None]
    assert [one["evidence"] for one in asked] == [["D2:1"], ["D1:1", "D1:2"]]


@pytest.mark.parametrize(("given", "said"), [
    ("{", "is not JSON"),
    ("{}", "is not a list of conversations"),
    (json.dumps([{"qa": []}]), "conversation 0 has neither"),
    (json.dumps([CONVERSATION]), "conversation 0 has no list `qa`"),
    (json.dumps([{"session_1": [{"speaker": "Ann", "text": "Hello"}], "qa": []}]), "turn 0 of session_1 has no text `dia_id`"),
    (json.dumps([{"sessions": [CONVERSATION["session_2"]] * 2, "qa": []}]), "'D2:1' is there twice"),
    (json.dumps([{**CONVERSATION, "qa": QUESTIONS[2:]}]), "no question whose evidence is there"),
    (json.dumps([{**CONVERSATION, "qa": [{"evidence": []}]}]), "qa 0 has no text `question`"),
    (json.dumps([{"sessions": 3, "qa": []}]), "`sessions` is not a list"),
    (None, "cannot be read"),
])
def test_a_file_of_conversations_that_cannot_be_used_is_said_to_be_so(tmp_path: Path, given: str | None, said: str) -> None:
    path = tmp_path / "given.json"
    if given is not None:
        path.write_text(given)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        cells_of_memory_scoring("def read_conversations")["read_conversations"](path)
    assert str(caught.value).startswith("data: ")


def test_built_conversations_have_their_evidence_once_and_the_sizes_they_were_asked_for() -> None:
    built = cells_of_memory_scoring("SUBJECTS")["built"]
    memories, asked = built(400, random.Random(1), "test", 60)
    assert built(400, random.Random(1), "test", 60) == (memories, asked) and len(memories) == 400 and len(asked) > 30
    texts = {memory["id"]: memory for memory in memories}
    assert len(texts) == 400 and {one["kind"] for one in asked} == {"direct", "answer", "later"}
    assert len({one["question"] for one in asked}) == len(asked)
    for one in asked:
        (evidence,) = (texts[id] for id in one["evidence"])
        said = set(re.findall(r"\w{4,}", evidence["text"].lower()))
        name = next(word for word in one["question"].split() if word.rstrip("?").istitle() and word not in ("What", "Which", "Where", "How")).rstrip("?")
        assert not said & (set(re.findall(r"\w{4,}", one["question"].lower())) - {name.lower()}), (one, evidence)
        if one["kind"] == "direct":
            assert name in evidence["text"] or evidence["metadata"]["speaker"] == name


def test_a_given_file_is_searched(tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_text(json.dumps([{**CONVERSATION, "qa": QUESTIONS}]))
    done = run("memory_scoring", tmp_path / "runs", **{**BRIEF["memory_scoring"], "datasets": "data", "data": path, "scales": "100"})
    assert done.returncode == 0, done.stderr[-3000:]
    (finished,) = find_finished(tmp_path / "runs")
    metrics = result(Path(getattr(finished, "folder", finished)))["metrics"]
    assert metrics["data_questions"] == 2 and metrics["data_questions_left_out"] == 2 and metrics["data_words_around_recall_at_5"] == 1.0
    refused = run("memory_scoring", tmp_path / "refused", datasets="data")
    assert refused.returncode and "data: the dataset 'data' needs the path of a file" in refused.stderr
