"""Head pruning over every family: masks and cuts agree, what is pruned loads again, and the scores mean what they say."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ai_sleep_constructs import load_corpus, load_model
from ai_sleep_constructs.reference.loading import CheckpointError
from ai_sleep_constructs.reference.pruned import MANIFEST, groups_left
from ai_sleep_constructs.reference.architecture import attention_blocks
from ai_sleep_constructs.sleep.guard import GuardSet, sample_sequences
from ai_sleep_constructs.sleep.hashing import hash_model
from ai_sleep_constructs.sleep.head_importance import IMPORTANCES, channel_statistics, measure_importance
from ai_sleep_constructs.sleep.head_surgery import HeadMask, heads_of_groups, prune_groups, save_pruned
from ai_sleep_constructs.sleep.state import LMModelState
from ai_sleep_constructs.sleep.strategies.base import SleepContext, run_transaction
from ai_sleep_constructs.sleep.strategies.head_pruning import AttentionHeadPruning, choose_in_rounds

SMALL = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "head_dim": 8,
    "initializer_range": 0.2,
}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=128, n_embd=48, n_layer=3, n_head=6, n_positions=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=4, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{**SMALL, "hidden_size": 64}, num_key_value_heads=4)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=4, tie_word_embeddings=True)),
}
IDS = torch.randint(1, 128, (4, 32), generator=torch.Generator().manual_seed(3))
GONE = {0: [1], 2: [0, 3]}


@pytest.fixture(params=FAMILIES)
def tiny(request):
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    with torch.no_grad():  # biases start at zero, and a lost zero is not noticed
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def reference():
    return load_model("reference")


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


def cut(model, gone, means=None):
    for layer, groups in gone.items():
        prune_groups(attention_blocks(model)[layer], groups, None if means is None else means[layer])


# ---- masks and cuts ----


@pytest.mark.parametrize("head", [0, 3, 5])
def test_any_query_head_can_be_silenced_and_given_back(tiny, head):
    dense = logits(tiny)
    by_hand = copy.deepcopy(tiny)
    block = attention_blocks(by_hand)[1]
    at = slice(head * block.head_dim, (head + 1) * block.head_dim)
    with torch.no_grad():
        (block.out.weight[at] if block.fused else block.out.weight[:, at]).zero_()
    mask = HeadMask(tiny, {1: [head]})
    silenced = logits(tiny)
    assert (silenced - logits(by_hand)).abs().max() < 1e-5 < 1e-2 < (silenced - dense).abs().max()
    mask.remove()
    mask.remove()
    assert torch.equal(logits(tiny), dense)


@pytest.mark.parametrize(("heads", "word"), [({3: [0]}, "layer 3"), ({0: [0], 1: [8]}, "layer 1"), ({0: [-1]}, "layer 0")])
def test_a_mask_of_heads_that_are_not_there_is_refused(tiny, heads, word):
    with pytest.raises(ValueError, match=word):
        HeadMask(tiny, heads)
    assert all(not block.out._forward_pre_hooks for block in attention_blocks(tiny))


@pytest.mark.parametrize("compensated", [False, True])
def test_a_mask_and_a_cut_give_the_same(tiny, compensated):
    tiny.double()
    dense = logits(tiny)
    means = channel_statistics(tiny, IDS)[0] if compensated else None
    smaller = copy.deepcopy(tiny)
    cut(smaller, GONE, means)
    with HeadMask(tiny, heads_of_groups(attention_blocks(tiny), GONE), means):
        masked = logits(tiny)
    difference = float((masked - logits(smaller)).abs().max())
    print(f"{type(tiny).__name__} compensated={compensated}: mask against cut {difference:.1e} in float64")
    assert difference < 1e-11 and (masked - dense).abs().max() > 1e-2
    assert smaller.num_parameters() < tiny.num_parameters()
    assert (logits(smaller.float()) - masked).abs().max() < 1e-3


def test_compensation_keeps_the_mean_output(tiny):
    def mean_output(model):
        seen = []
        handle = attention_blocks(model)[0].out.register_forward_hook(lambda m, a, out: seen.append(out))
        logits(model)
        handle.remove()
        return seen[0].flatten(0, 1).mean(0)

    before = mean_output(tiny)
    bare, compensated = copy.deepcopy(tiny), copy.deepcopy(tiny)
    cut(bare, {0: [1, 2]})
    cut(compensated, {0: [1, 2]}, channel_statistics(tiny, IDS)[0])
    assert (mean_output(compensated) - before).abs().max() < 1e-5 < 1e-3 < (mean_output(bare) - before).abs().max()


# ---- saving and loading ----


def test_two_nights_survive_saving(tiny, reference, tmp_path):
    folder = tmp_path / "pruned"
    cut(tiny, GONE)
    save_pruned(tiny, folder, reference.tokenizer)
    first = load_model(folder).model
    assert type(first) is type(tiny) and torch.equal(logits(first), logits(tiny))
    assert hash_model(first) == hash_model(tiny)
    cut(first, {1: [2], 2: [0]}, channel_statistics(first, IDS)[0])
    save_pruned(first, folder, reference.tokenizer)
    second = load_model(folder).model
    assert torch.equal(logits(second), logits(first)) and not torch.equal(logits(second), logits(tiny))
    blocks = attention_blocks(second)
    total = attention_blocks(FAMILIES["gpt2"]())[0].groups if blocks[0].fused else (8 if blocks[0].heads_per_group == 1 else 4)
    left = [[g for g in range(total) if g not in gone] for gone in ([1], [2], [0, 1, 3])]
    assert [groups_left(b.module, b.groups) for b in blocks] == [(total, kept) for kept in left]
    assert [layer["kept"] for layer in json.loads((folder / MANIFEST).read_text())["layers"]] == left
    assert [file.name for file in tmp_path.iterdir()] == ["pruned"]
    third = second.generate(IDS[:1, :5], max_new_tokens=5, do_sample=False)
    assert torch.equal(third, first.generate(IDS[:1, :5], max_new_tokens=5, do_sample=False))


def test_plain_loading_and_other_dtypes(reference, tmp_path):
    model = copy.deepcopy(reference.model)
    cut(model, GONE)
    save_pruned(model, tmp_path / "m", reference.tokenizer)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    half = load_model(tmp_path / "m", dtype="bfloat16").model
    assert half.dtype == torch.bfloat16 and half.num_parameters() == model.num_parameters()
    unpruned = save_pruned(reference.model, tmp_path / "m", reference.tokenizer)
    assert torch.equal(logits(load_model(unpruned).model), logits(reference.model))


def _edit(file, change):
    file.write_text(change(file.read_text()))


FAULTS = {
    "a changed number": (lambda f: _edit(f / MANIFEST, lambda t: t.replace('"kept": [\n    0', '"kept": [\n    1', 1)), "damaged"),
    "cut short": (lambda f: _edit(f / MANIFEST, lambda t: t[: len(t) // 2]), "not valid JSON"),
    "a later version": (lambda f: _edit(f / MANIFEST, lambda t: t.replace('"version": 1', '"version": 2')), "version 2"),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), "version None"),
    "other weights": (lambda f: (f / "model.safetensors").write_bytes((f / "other.bin").read_bytes()), "other weights.*model.safetensors"),
    "other layers": (lambda f: _edit(f / "config.json", lambda t: t.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2')), "config.json"),
    "other groups": (lambda f: _edit(f / "config.json", lambda t: t.replace('"num_key_value_heads": 4', '"num_key_value_heads": 2')), "had 4 groups"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_manifest_that_does_not_fit_is_an_error(fault, reference, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES["mistral"]()
    cut(model, GONE)
    save_pruned(model, tmp_path / "m", reference.tokenizer)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_pruned(model, tmp_path / "other", reference.tokenizer)
    (tmp_path / "m" / "other.bin").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    load_model(tmp_path / "m")
    change, words = FAULTS[fault]
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    change(tmp_path / "m")
    assert before != {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path / "m")


def test_a_save_that_fails_leaves_the_older_checkpoint(reference, tmp_path):
    class NoTokenizer:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    folder = save_pruned(reference.model, tmp_path / "m", reference.tokenizer)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = copy.deepcopy(reference.model)
    cut(model, GONE)
    with pytest.raises(OSError, match="disk full"):
        save_pruned(model, folder, NoTokenizer())
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before and [*tmp_path.iterdir()] == [folder]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes"):
        save_pruned(model, tmp_path / "notes", reference.tokenizer)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


# ---- importance ----


def test_the_oracle_is_what_the_loss_grows_by(tiny):
    def loss(model):
        return float(torch.nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"))

    scores = measure_importance(tiny, IDS, "ablation", batch_size=3)
    for layer, group in ((0, 0), (1, 2), (2, 3)):
        smaller = copy.deepcopy(tiny)
        cut(smaller, {layer: [group]})
        grown = (loss(smaller) - loss(tiny)) / len(IDS)
        assert abs(float(scores[layer][group]) - grown) < 1e-3 and abs(grown) > 1e-2


def test_flap_is_the_weighted_variance_and_constant_groups_score_nothing(tiny):
    block = attention_blocks(tiny)[1]
    with torch.no_grad():
        seen = []
        handle = block.out.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1).double()))
        logits(tiny)
        handle.remove()
        weight = (block.out.weight.T if block.fused else block.out.weight).double()
        by_hand = (seen[0].var(0, unbiased=False) * weight.norm(dim=0) ** 2).view(block.groups, -1).sum(1)
    scores = measure_importance(tiny, IDS, "flap", batch_size=3)
    assert torch.allclose(scores[1], by_hand / by_hand.sum(), rtol=1e-4)
    with HeadMask(tiny, heads_of_groups(attention_blocks(tiny), {1: [2]}), [torch.full((m.numel(),), 3.0) for m in channel_statistics(tiny, IDS)[0]]):
        assert float(measure_importance(tiny, IDS, "flap")[1][2]) < 1e-9


@pytest.mark.parametrize("method", IMPORTANCES)
def test_every_method_leaves_the_model_as_it_was(tiny, method):
    tiny.train()
    before, hooks = hash_model(tiny), [len(b.out._forward_pre_hooks) for b in attention_blocks(tiny)]
    scores = measure_importance(tiny, IDS[:2], method, seed=1)
    assert [len(v) for v in scores] == [b.groups for b in attention_blocks(tiny)]
    assert all(v.dtype == torch.float64 and v.isfinite().all() for v in scores)
    again, other = measure_importance(tiny, IDS[:2], method, seed=1), measure_importance(tiny, IDS[:2], method, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(scores, again, strict=True))
    assert (method == "random") == (not torch.equal(torch.cat(scores), torch.cat(other)))
    assert hash_model(tiny) == before and all(m.training for m in tiny.modules())
    assert [len(b.out._forward_pre_hooks) for b in attention_blocks(tiny)] == hooks
    assert all(p.grad is None for p in tiny.parameters())


def test_magnitude_is_the_norm_of_what_goes(tiny):
    scores = measure_importance(tiny, IDS, "magnitude")
    smaller = copy.deepcopy(tiny)
    cut(smaller, {1: [1]})

    def weights(model):
        return sum(float(p.detach().double().square().sum()) for n, p in model.named_parameters() if n.endswith("weight"))

    assert abs(float(scores[1][1]) ** 2 - (weights(tiny) - weights(smaller))) < 1e-3


def test_the_oracle_in_rounds_beats_the_oracle_at_once(reference):
    """A group that was dispensable may be needed once another is gone; only a second measurement can know."""
    model = copy.deepcopy(reference.model)
    ids = sample_sequences(reference.tokenizer, load_corpus("python", "train", max_bytes=30_000).texts, 1, 128)
    truth = measure_importance(model, ids, "ablation")
    at_once, first = choose_in_rounds(model, ids, "ablation", 0.5)
    in_rounds, same = choose_in_rounds(model, ids, "ablation", 0.5, rounds=4)
    assert all(torch.equal(a, b) for a, b in zip(first, truth, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert sum(map(len, at_once.values())) == sum(map(len, in_rounds.values())) == 12

    def loss(chosen):
        with HeadMask(model, heads_of_groups(attention_blocks(model), chosen)):
            out = logits(model, ids)[:, :-1]
        return float(torch.nn.functional.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten()))

    assert loss(in_rounds) < loss(at_once)
    assert not any(block.out._forward_pre_hooks for block in attention_blocks(model))


# ---- the strategy ----


@pytest.fixture(scope="module")
def material(reference):
    guard = GuardSet.of_texts(reference.tokenizer, load_corpus("python", "guard", max_bytes=40_000).texts, sequences=4)
    return guard, sample_sequences(reference.tokenizer, load_corpus("python", "train", max_bytes=60_000).texts, 3, 256)


def test_flap_with_bias_beats_every_random_choice_with_bias(reference, material):
    guard, calibration = material
    bits = []
    for options in ({"pruning_importance": "flap"}, *({"pruning_importance": "random", "pruning_seed": s} for s in range(4))):
        context = SleepContext(LMModelState("m"), copy.deepcopy(reference.model), None, guard, calibration)
        strategy = AttentionHeadPruning(pruning_fraction=0.5, pruning_compensation=True, max_regression=10.0, **options)
        report = run_transaction(strategy, context)
        assert report.status == "committed" and report.details["compensated"], report
        bits.append(report.bits_after)
    print("flap, random...", bits)
    assert bits[0] < min(bits[1:])


def test_a_refused_cut_with_bias_leaves_no_trace(reference, material):
    guard, calibration = material
    model = copy.deepcopy(reference.model)
    cut(model, {4: [0]})
    before, plain = hash_model(model), [set(vars(b.module)) for b in attention_blocks(model)]
    context = SleepContext(LMModelState("m"), model, None, guard, calibration)
    report = run_transaction(AttentionHeadPruning(pruning_fraction=0.5, pruning_importance="flap", max_regression=0.0), context)
    assert report.status == "rolled_back" and report.details["pruned"]
    assert hash_model(model) == before and [set(vars(b.module)) for b in attention_blocks(model)] == plain
    assert all(b.out.bias is None for b in attention_blocks(model)) and not context.state.attention_heads
    assert [groups_left(b.module, b.groups)[1] for b in attention_blocks(model)] == [[0, 1, 2, 3]] * 4 + [[1, 2, 3], [0, 1, 2, 3]]


def test_the_record_counts_original_heads_over_nights_and_reloading(reference, material, tmp_path):
    _, calibration = material
    night = AttentionHeadPruning(pruning_fraction=0.25, pruning_importance="flap", max_regression=10.0)
    state = LMModelState("m")
    model = copy.deepcopy(reference.model)
    first = run_transaction(night, SleepContext(state, model, None, None, calibration)).details["pruned"]
    loaded = load_model(save_pruned(model, tmp_path / "m", reference.tokenizer)).model
    fresh = LMModelState("loaded")
    second = run_transaction(night, SleepContext(fresh, loaded, None, None, calibration)).details["pruned"]
    assert second and sum(map(len, first.values())) == 12 and sum(map(len, second.values())) == 8  # 6 and then 4 (of 18) groups of 2 heads
    for block in attention_blocks(loaded):
        gone = {*first.get(block.layer_id, ()), *second.get(block.layer_id, ())}
        assert len(gone) == len(first.get(block.layer_id, ())) + len(second.get(block.layer_id, ()))
        left = groups_left(block.module, block.groups)[1]
        assert {h // 2 for h in gone} == set(range(4)) - set(left)
        if block.layer_id in second:
            assert fresh.attention_heads[block.layer_id]["pruned"] == sorted(gone)
    run_transaction(night, SleepContext(state, model, None, None, calibration))
    for layer_id in second:
        assert state.attention_heads[layer_id] == fresh.attention_heads[layer_id]


@pytest.mark.parametrize(
    "options",
    [
        {"pruning_importance": "gradients"}, {"pruning_rounds": 0, "pruning_fraction": 0.5}, {"pruning_rounds": 2},
        {"pruning_rounds": True}, {"pruning_compensation": 1.5}, {"pruning_seed": 0.5},
    ],
    ids=str,
)
def test_bad_options_name_themselves(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AttentionHeadPruning(**options)
