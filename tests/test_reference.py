"""The reference package: the split, the measure, loading and its errors, training that resumes."""

import hashlib
import json
import logging
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ai_sleep_constructs.reference import corpus as corpus_module
from ai_sleep_constructs.reference import loading
from ai_sleep_constructs.reference.corpus import SPLITS, Corpus, CorpusNotFoundError, Document, load_corpus, split_of
from ai_sleep_constructs.reference.evaluation import bits_per_byte, evaluate, perplexity, xz_bits_per_byte
from ai_sleep_constructs.reference.loading import CheckpointError, ModelNotFoundError, checkpoints_folder, load_model
from ai_sleep_constructs.reference.muon import Muon, orthogonalize
from ai_sleep_constructs.reference.recipe import PRESETS, TrainingConfig
from ai_sleep_constructs.reference.training import export_checkpoint, read_run, train

ODD = ["", "\t \r\n\n x  ", "naïve Ω 漢字 🛌", "\x00\x07", " 1234567 ", "<|endoftext|", "def f(x):\n        return x\n"]
TINY = TrainingConfig(vocab_size=400, hidden_size=16, intermediate_size=32, layers=1, heads=2, kv_heads=1, positions=32, steps=6,
                      batch_tokens=128, micro_tokens=64, contexts=((0.0, 16), (0.5, 32)), warmup=2, max_bytes=60_000)


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_model("reference", device="cpu")


# corpus

def test_the_split_of_a_path_never_changes() -> None:
    expected = {"abc.py": "train", "argparse.py": "train", "ast.py": "test", "cmd.py": "guard", "difflib.py": "guard",
                "json/decoder.py": "train", "typing.py": "test", "urllib/parse.py": "guard", "xmlrpc/server.py": "test"}
    assert {path: split_of(path) for path in expected} == expected


def test_shares_of_the_splits() -> None:
    splits = [split_of(f"module_{i}.py") for i in range(20_000)]
    shares = {split: splits.count(split) / len(splits) for split in SPLITS}
    assert shares == pytest.approx({"train": 0.85, "guard": 0.05, "test": 0.10}, abs=0.01)


@pytest.mark.parametrize("name", ["python", "cpp", "english"])
def test_no_document_is_in_two_splits(name: str) -> None:
    paths = {split: {d.path for d in load_corpus(name, split).documents} for split in SPLITS}
    assert all(paths.values())
    assert sum(map(len, paths.values())) == len(set.union(*paths.values()))


def test_python_holds_out_no_test_packages_and_no_generated_tables() -> None:
    for split in SPLITS:
        documents = load_corpus("python", split).documents
        assert not any(set(d.path.split("/")) & {"encodings", "pydoc_data", "site-packages"} for d in documents)
        if split != "train":
            assert not any(set(d.path.split("/")[:-1]) & {"test", "tests", "idle_test"} for d in documents)
        assert [d.path for d in documents] == sorted(d.path for d in documents)


def test_a_sample_is_spread_nested_and_exact() -> None:
    small, large = (load_corpus("cpp", "train", max_bytes=size) for size in (30_000, 90_000))
    assert (small.size, large.size) == (30_000, 90_000)
    assert [d.path for d in large.documents[:len(small)]] == [d.path for d in small.documents]
    assert small.sha256 != large.sha256 and small.sha256 == load_corpus("cpp", "train", max_bytes=30_000).sha256


def test_the_hash_covers_paths_texts_and_their_borders() -> None:
    def of(*pairs: tuple[str, str]) -> str:
        return Corpus("x", "test", tuple(Document(*pair) for pair in pairs)).sha256

    assert len({of(("a", "bc")), of(("ab", "c")), of(("a", "b"), ("", "c")), of(("a", "b"), ("c", "")), of(("a", "bd"))}) == 5


def test_a_sample_cuts_between_characters(tmp_path: Path) -> None:
    (tmp_path / next(f"{i}.txt" for i in range(100) if split_of(f"{i}.txt") == "test")).write_text("é" * 50, encoding="utf-8")
    assert load_corpus(tmp_path, "test", max_bytes=31).texts == ["é" * 15]


def test_a_folder_reads_text_and_skips_the_rest(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i}.md").write_text(f"text {i}", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "image.png").write_bytes(b"png")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    found = [d for split in SPLITS for d in load_corpus(tmp_path, split).documents]
    assert sorted(d.text for d in found) == sorted(f"text {i}" for i in range(60))


@pytest.mark.parametrize(("arguments", "says"), [
    (("python", "valid"), "split is 'valid'"), (("", "test"), "name is ''"), ((3, "test"), "name is 3")])
def test_bad_corpus_arguments(arguments: tuple[Any, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_corpus(*arguments)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_bad_max_bytes(size: Any) -> None:
    with pytest.raises(ValueError, match="max_bytes is"):
        load_corpus("python", "test", max_bytes=size)


def test_an_unknown_corpus_says_what_works(tmp_path: Path) -> None:
    with pytest.raises(CorpusNotFoundError, match='"python", "cpp", "english", or the path of a folder') as caught:
        load_corpus("pyhton")
    assert "pyhton" in str(caught.value)
    (tmp_path / next(f"{i}.txt" for i in range(100) if split_of(f"{i}.txt") == "train")).write_text("one file")
    with pytest.raises(CorpusNotFoundError, match="no text in its split 'test'"):
        load_corpus(tmp_path, "test")


def test_a_hub_data_set_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusNotFoundError, match=r"ai-sleep-constructs\[hub\]"):
        load_corpus("owner/name", "test")


def test_rows_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types
    asked: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((arguments, options))
        return [{"text": f"row {i}"} for i in range(200)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = [d for split in SPLITS for d in load_corpus("owner/name:raw", split).documents]
    assert asked[0] == (("owner/name", "raw"), {"split": "train", "streaming": True})
    assert sorted(d.text for d in rows) == sorted(f"row {i}" for i in range(200))
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *a, **k: [{"body": "x"}])
    with pytest.raises(CorpusNotFoundError, match=r"no column 'text', only \['body'\]"):
        load_corpus("owner/name", "test")


def test_english_needs_no_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module.importlib.metadata, "distributions", lambda: iter(()))
    assert all(len(load_corpus("english", split)) for split in SPLITS)


# evaluation

def test_the_tokenizer_gives_text_back(reference: Any) -> None:
    for text in ODD:
        assert reference.tokenizer.decode(reference.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_bits_per_byte_is_the_cost_token_by_token(reference: Any) -> None:
    texts, (model, tokenizer) = ["class A:\n    def f(self): return 1\n", "é"], reference
    nll = 0.0
    for text in texts:
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for at in range(1, len(ids)):  # window 8, stride 4: what a token may see
            start = 0 if at <= 8 else 4 * math.ceil((at - 8) / 4)
            with torch.inference_mode():
                logits = model(torch.tensor([ids[start:at]])).logits[0, -1].double()
            nll -= float(logits.log_softmax(-1)[ids[at]])
    expected = nll / math.log(2) / sum(len(text.encode()) for text in texts)
    assert bits_per_byte(model, tokenizer, texts, window=8, stride=4, batch_size=3) == pytest.approx(expected, rel=1e-5)


def test_more_context_costs_less_and_flags_are_left_alone(reference: Any) -> None:
    model, tokenizer = reference
    texts = load_corpus("python", "test", max_bytes=1_500).texts
    model.model.layers[0].train()
    try:
        short, long = (bits_per_byte(model, tokenizer, texts, window=size) for size in (16, 256))
        assert long < short and model.model.layers[0].training and not model.model.layers[1].training
    finally:
        model.eval()


def test_perplexity_and_end_of_text(reference: Any) -> None:
    cost, open_end = (evaluate(*reference, "import os\n", add_eot=flag) for flag in (True, False))
    assert cost.tokens == open_end.tokens + 1 and cost.nll > open_end.nll
    assert perplexity(*reference, "import os\n") == pytest.approx(math.exp(cost.nll / cost.tokens))


@pytest.mark.parametrize(("options", "says"), [
    ({"window": 0}, "window is 0"), ({"window": 2000}, "window is 2000"), ({"window": 8, "stride": 9}, "stride is 9"),
    ({"stride": 0}, "stride is 0"), ({"batch_size": 0}, "batch_size is 0")])
def test_bad_windows(reference: Any, options: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate(*reference, ["x"], **options)


def test_no_text_has_no_cost(reference: Any) -> None:
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="no text at all"):
            evaluate(*reference, texts)
        with pytest.raises(ValueError, match="no text at all"):
            xz_bits_per_byte(texts)


def test_the_reference_beats_xz(reference: Any) -> None:
    texts = load_corpus("python", "test", max_bytes=8_000).texts
    assert bits_per_byte(*reference, texts) < xz_bits_per_byte(texts)


# loading

SHIPPED = [folder for folder in loading.SHIPPED.values() if (checkpoints_folder() / folder).exists()]


@pytest.mark.parametrize("folder", SHIPPED)
def test_training_json_is_about_these_files_and_this_recipe(folder: str) -> None:
    place = checkpoints_folder() / folder
    record = json.loads((place / "training.json").read_text())
    assert record["files"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in place.iterdir() if file.name != "training.json"}
    assert record["config"] == json.loads(json.dumps(asdict(PRESETS[folder])))
    assert record["evaluation"]["test"]["ratio_to_xz"] < {"mistral": 0.75, "gpt2": 1}[folder]
    assert sum(tensor.numel() for tensor in load_file(place / "model.safetensors").values()) == record["parameters"]
    assert sum(file.stat().st_size for file in place.iterdir()) < 24_000_000


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A copy of the package's checkpoints, looked up in place of them."
    copy = Path(shutil.copytree(checkpoints_folder(), tmp_path / "checkpoints"))
    monkeypatch.setattr(loading, "checkpoints_folder", lambda: copy)
    return copy / "mistral"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_one_flipped_bit_is_found(damaged: Path, name: str) -> None:
    load_model("reference", device="cpu")
    data = bytearray((damaged / name).read_bytes())
    expected = hashlib.sha256(data).hexdigest()
    data[len(data) // 2] ^= 1
    (damaged / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="corrupt") as caught:
        load_model("reference")
    for part in (name, expected, hashlib.sha256(data).hexdigest(), "git checkout", "pip install"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "training.json"])
def test_a_missing_file_is_named(damaged: Path, name: str) -> None:
    (damaged / name).unlink()
    with pytest.raises(CheckpointError, match="missing") as caught:
        load_model("reference")
    assert name in str(caught.value) and "git checkout" in str(caught.value)


def test_damaged_folders_of_others(damaged: Path) -> None:
    (damaged / "training.json").unlink()
    weights = (damaged / "model.safetensors").read_bytes()
    assert load_model(damaged, device="cpu").model.num_parameters() > 1e6
    (damaged / "model.safetensors").write_bytes(weights[:len(weights) // 2])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_model(damaged)
    (damaged / "model.safetensors").write_bytes(weights)
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 tensors .* model\.norm\.weight"):
        load_model(damaged)
    (damaged / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_model(damaged)
    (damaged / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model(damaged)


def test_pickled_weights_are_refused(damaged: Path) -> None:
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no \\*.safetensors file"):
        load_model(damaged)


@pytest.mark.parametrize("name", ["refrence", "owner/no-such-model", "./no/such/folder"])
def test_an_unknown_name_says_where_it_was_looked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError) as caught:
        load_model(name)
    for part in (repr(name), "'reference', 'reference-gpt2'", str(Path(name).absolute()), "Hugging Face hub", "load_model('reference') always works"):
        assert part in str(caught.value)
    if "./" not in name:
        assert "HF_HUB_OFFLINE is set" in str(caught.value)


def test_an_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def model_info(self: Any, name: str, timeout: float) -> None:
        asked.append((name, timeout))
        raise ConnectionError("no route")

    monkeypatch.setattr(loading.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading.huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(ModelNotFoundError, match=r"could not be reached \(ConnectionError: no route\)"):
        load_model("owner/no-such-model")
    assert len(asked) == 1 and asked[0][1] <= 10


@pytest.mark.parametrize(("options", "says"), [
    ({"dtype": "float8"}, "dtype is 'float8'"), ({"dtype": torch.int8}, "dtype is torch.int8"), ({"device": "gpu0"}, "device is 'gpu0'"),
    ({"device": "cuda:99"}, "device is 'cuda:99'"), ({"quantization": "2bit"}, "quantization is '2bit'"), ({"name_or_path": " "}, "name_or_path is ' '")])
def test_bad_loading_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_model(**options)


def test_dtype_and_mode(reference: Any) -> None:
    assert reference.model.dtype == torch.float32 and not reference.model.training
    assert load_model(dtype="auto", device="cpu").model.dtype == torch.bfloat16
    assert load_model(dtype="float16", device="cpu").model.dtype == torch.float16


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantization_on_a_cpu(reference: Any, quantization: str, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    with caplog.at_level(logging.WARNING):
        model, tokenizer = load_model(quantization=quantization, device="cpu")
        ids = tokenizer("def main():\n    return", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits, exact = model(ids).logits.float(), reference.model(ids).logits
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]
    assert torch.isfinite(logits).all() and not torch.equal(logits, exact)
    assert torch.cosine_similarity(logits.flatten(), exact.flatten(), dim=0) > 0.95
    assert model.get_memory_footprint() < 0.7 * reference.model.get_memory_footprint()


def test_quantization_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"ai-sleep-constructs\[quantization\]"):
        load_model(quantization="4bit")


# training

def test_muon_sets_singular_values_to_one() -> None:
    matrix = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for x in (matrix, matrix.mT):
        values = torch.linalg.svdvals(orthogonalize(x))
        assert values.min() > 0.5 and values.max() < 1.3 and orthogonalize(x).shape == x.shape
    with pytest.raises(ValueError, match="for matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("architecture", ["mistral", "gpt2"])
def test_a_resumed_run_is_the_uninterrupted_run(architecture: str, tmp_path: Path) -> None:
    config = replace(TINY, architecture=architecture)
    train(config, tmp_path / "whole", device="cpu", progress=False)
    for until in (1, 4, None):
        train(config, tmp_path / "parts", device="cpu", progress=False, until=until)
    one, other = (load_file(tmp_path / name / "state.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert read_run(tmp_path / "whole").log == read_run(tmp_path / "parts").log
    assert read_run(tmp_path / "parts").step == 6


def test_a_killed_run_keeps_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ai_sleep_constructs.reference import training
    real = training._step

    def interrupted(*arguments: Any) -> float:
        interrupted.left -= 1  # type: ignore[attr-defined]
        if interrupted.left < 0:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return real(*arguments)

    interrupted.left = 5  # type: ignore[attr-defined]
    monkeypatch.setattr(training, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path, device="cpu", progress=False, checkpoint_every=2)
    assert read_run(tmp_path).step == 4
    monkeypatch.setattr(training, "_step", real)
    (tmp_path / "state.json").write_text("{}")  # as after a kill between the two files: the tensors' own record counts
    assert read_run(train(TINY, tmp_path, device="cpu", progress=False)).step == 6


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    train(TINY, tmp_path, device="cpu", progress=False, until=2)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"learning_rate \(0.005 there, 0.1 here\)"):
        train(replace(TINY, learning_rate=0.1), tmp_path, device="cpu", progress=False)
    with pytest.raises(ValueError, match="steps can change only before"):
        train(replace(TINY, steps=3), tmp_path, device="cpu", progress=False)
    assert (tmp_path / "state.safetensors").read_bytes() == before
    train(replace(TINY, steps=8), tmp_path, device="cpu", progress=False, until=4)
    assert read_run(tmp_path).config.steps == 8


def test_an_unreadable_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"not a file of tensors")
    for act in (lambda: train(TINY, tmp_path, progress=False), lambda: export_checkpoint(tmp_path, tmp_path / "x")):
        with pytest.raises(CheckpointError, match="no readable training run"):
            act()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("change", "says"), [
    ({"architecture": "rnn"}, "architecture is 'rnn'"), ({"heads": 3}, "heads is 3"), ({"contexts": ((0.5, 16),)}, "contexts is"),
    ({"contexts": ((0.0, 64),)}, "contexts is"), ({"steps": 0}, "steps is 0"), ({"decay": 0.0}, "decay is 0")])
def test_bad_configurations(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(TINY, **change)


def test_an_exported_checkpoint_replaces_the_old_one_and_loads(tmp_path: Path) -> None:
    train(TINY, tmp_path / "run", device="cpu", progress=False)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "stale").touch()
    record = export_checkpoint(tmp_path / "run", tmp_path / "target", max_bytes=1_000, device="cpu")
    assert not (tmp_path / "target" / "stale").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["run", "target"]
    assert loading.verify_checkpoint(tmp_path / "target")["steps"] == 6 and record["tokens"] == 6 * 128
    model, tokenizer = load_model(tmp_path / "target", device="cpu")
    texts = load_corpus("python", "test", max_bytes=1_000).texts
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(record["evaluation"]["test"]["bits_per_byte"], rel=1e-4)
