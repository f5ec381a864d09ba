"""What the notebooks of merging, rehearsal and semantic consolidation cannot say: families, faults, properties, no-ops."""

import copy
import importlib.util
import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ai_sleep_constructs import AISleepController, OptimizationStrategy, SleepMode, SleepTrigger, load_model
from ai_sleep_constructs.sleep.hashing import hash_model
from ai_sleep_constructs.sleep.merging import HiddenStateMemory, TextMemory, merge_vectors, text_vectors
from ai_sleep_constructs.sleep.rehearsal import METHODS, Rehearsal, dream, forgetting, rehearse
from ai_sleep_constructs.sleep.session import Session
from ai_sleep_constructs.sleep.state import LMModelState
from ai_sleep_constructs.sleep.strategies.base import SleepContext, run_transaction
from ai_sleep_constructs.sleep.strategies.semantic_consolidation import SemanticConsolidation

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=4, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
}
DAY = (torch.arange(16)[None] * torch.tensor([[1], [2], [3], [5]]) % 60) + 1  # int64 [4, 16], easy to learn


def tiny(family="llama"):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def available(method):
    if method == "lora" and importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")


# ---- rehearsal ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_on_every_family_and_leaves_nothing_behind(family, method):
    available(method)
    model = tiny(family).train()
    names = [name for name, _ in model.named_parameters()]
    frozen = next(model.parameters()).requires_grad_(False)
    random_state = torch.get_rng_state()
    report = rehearse(model, DAY, method, steps=6, learning_rate=0.02, stored=DAY.flip(1), seed=1)
    assert report["steps"] == 6 and report["loss_after"] < report["loss_before"]
    assert [name for name, _ in model.named_parameters()] == names  # no adapter is left
    assert model.training and not frozen.requires_grad and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    hashes = []
    for seed in (3, 3, 4):
        model = tiny()
        rehearse(model, DAY, "replay", steps=3, seed=seed)
        hashes.append(hash_model(model))
    assert hashes[0] == hashes[1] != hashes[2]


def test_low_precision_weights_learn_too():
    model = tiny().to(torch.bfloat16)
    report = rehearse(model, DAY, "naive", steps=8, learning_rate=0.01)
    assert model.dtype is torch.bfloat16 and report["loss_after"] < report["loss_before"] - 0.1


def test_lora_changes_its_targets_only():
    available("lora")
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    touched = {id(p) for module in METHODS["lora"].touched(model) for p in module.parameters(recurse=False)}
    rehearse(model, DAY, "lora", steps=3, learning_rate=0.02, strength=2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(id(model.get_parameter(name)) in touched for name in changed)
    assert not any("embed" in name or "norm" in name for name in changed)


def test_lora_without_its_package_says_which(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = tiny()
    before = hash_model(model)
    with pytest.raises(ImportError, match="peft"):
        rehearse(model, DAY, "lora")
    assert hash_model(model) == before


def test_each_way_of_holding_on_moves_less_than_naive_training():
    def moved(method, strength):
        model = tiny()
        start = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
        ids = dream(model, 4, 16, seed=9)
        rehearse(model, DAY, method, steps=6, learning_rate=0.02, strength=strength)
        values = {name: p.detach() for name, p in model.named_parameters()}
        return forgetting(tiny(), values, ids), float((torch.cat([p.detach().flatten() for p in model.parameters()]) - start).norm())

    naive = moved("naive", 0.0)
    for method, strength in (("replay", 4.0), ("lwf", 4.0)):
        assert moved(method, strength)[0] < 0.8 * naive[0], method
    assert moved("ewc", 1e6)[0] < 0.5 * naive[0]
    assert moved("weight_average", 0.25)[1] == pytest.approx(0.25 * naive[1], rel=1e-3)


def test_forgetting_limits_the_way():
    model = tiny()
    free = rehearse(copy.deepcopy(model), DAY, "naive", steps=6, learning_rate=0.02, max_forgetting=10.0)
    held = rehearse(copy.deepcopy(model), DAY, "naive", steps=6, learning_rate=0.02, max_forgetting=free["forgetting"] / 4)
    assert free["way"] == 1.0 and 0 < held["way"] < 1 and held["forgetting"] <= free["forgetting"] / 4
    assert held["loss_before"] > held["loss_after"] > free["loss_after"]
    before = hash_model(model)
    none = rehearse(model, DAY, "naive", steps=2, learning_rate=0.02, max_forgetting=1e-12)
    assert none["way"] == 0.0 and hash_model(model) == before


def test_time_that_runs_out_stops_the_steps_and_the_dreams():
    model = tiny()
    before = hash_model(model)
    left = iter([1.0] * 3)
    assert rehearse(model, DAY, "naive", steps=9, remaining=lambda: next(left, 0.0))["steps"] == 3
    assert hash_model(model) != before
    model, before = tiny(), hash_model(tiny())
    late = rehearse(model, DAY, "replay", remaining=lambda: 0.0, max_forgetting=0.1)
    assert late["steps"] == 0 and late["dreamt"] == 0 and hash_model(model) == before
    assert dream(model, 4, 16, remaining=lambda: 0.0).shape == (0, 16)


@pytest.mark.parametrize(("option", "value"), [
    ("method", "sleepwalk"), ("steps", 0), ("steps", True), ("learning_rate", 0), ("batch_size", 1), ("ratio", 1.0),
    ("strength", -1.0), ("strength", math.nan), ("max_forgetting", 0), ("day", torch.zeros(2, 1, dtype=torch.long)),
    ("day", torch.zeros(2, 8)), ("day", torch.zeros(1, 65, dtype=torch.long)), ("day", torch.zeros(0, 8, dtype=torch.long)),
])
def test_bad_options_are_named_before_anything_changes(option, value):
    model = tiny()
    before = hash_model(model)
    with pytest.raises(ValueError, match=option):
        rehearse(**{"model": model, "day": DAY, option: value})
    assert hash_model(model) == before


def test_methods_check_what_they_need():
    with pytest.raises(ValueError, match="stored"):
        rehearse(tiny(), DAY, "stored_replay")
    with pytest.raises(ValueError, match="stored"):
        rehearse(tiny(), DAY, "stored_replay", stored=DAY[:, :8])
    with pytest.raises(ValueError, match="share"):
        rehearse(tiny(), DAY, "weight_average", strength=1.5)
    with pytest.raises(ValueError, match="rank"):
        rehearse(tiny(), DAY, "lora", strength=0.5)


def test_a_loss_that_is_not_finite_changes_nothing():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    before = hash_model(model)
    with pytest.raises(FloatingPointError, match="step 0"):
        rehearse(model, DAY, "naive")
    assert hash_model(model) == before


def test_dreams_follow_the_models_own_distribution():
    model, _ = load_model("reference")
    ids = dream(model, 12, 48, chain=1, seed=0)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    distribution = torch.distributions.Categorical(logits=logits)
    assert float(-distribution.log_prob(ids[:, 1:]).mean()) == pytest.approx(float(distribution.entropy().mean()), rel=0.15)
    assert torch.equal(ids, dream(model, 12, 48, chain=1, seed=0)) and not torch.equal(ids, dream(model, 12, 48, chain=1, seed=1))


def test_dreams_are_cut_from_chains_within_the_models_positions():
    model = tiny("gpt2")
    assert dream(model, 5, 32, chain=8, batch_size=2).shape == (5, 32)
    assert torch.equal(dream(model, 2, 16, chain=2).flatten()[None], dream(model, 1, 32, chain=1))
    with pytest.raises(ValueError, match="length"):
        dream(model, 1, 65)
    with pytest.raises(ValueError, match="sequences"):
        dream(model, 0, 8)


# ---- merging ----


def one_by_one(vectors, budget):
    "The definition: the two clusters with the highest mean cosine over all their pairs merge; then the next two."
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    cosine, clusters = unit @ unit.T, [[i] for i in range(len(vectors))]
    while len(clusters) > budget:
        _, a, b = max(
            (float(cosine[clusters[a]][:, clusters[b]].mean()), a, b) for a in range(len(clusters)) for b in range(a)
        )
        clusters[b] += clusters.pop(a)
    return {frozenset(c) for c in clusters}


@pytest.mark.parametrize("seed", range(6))
def test_rounds_merge_what_one_by_one_would(seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(12, 5, generator=generator)[torch.randint(0, 12, (40,), generator=generator)]
    vectors = vectors + 0.3 * torch.randn(40, 5, generator=generator)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    for budget in (39, 25, 9, 1):
        merging = merge_vectors(vectors, budget, block=7)
        clusters = [torch.nonzero(merging.owner == place)[:, 0] for place in range(budget)]
        assert {frozenset(c.tolist()) for c in clusters} == one_by_one(vectors, budget) and not merging.dropped
        for spokesman, members in zip(merging.kept.tolist(), clusters, strict=True):  # each is the nearest to its mean
            nearness = unit[members] @ unit[members].mean(0)
            assert float(nearness[members == spokesman]) >= float(nearness.max()) - 1e-4


def test_equal_vectors_merge_into_the_first():
    merging = merge_vectors(torch.ones(50, 3), 1)
    assert merging.kept.tolist() == [0] and merging.lowest == pytest.approx(1.0)
    assert merge_vectors(torch.zeros(5, 3), 2).kept.numel() == 2  # zero vectors have no direction and still obey the budget


def test_counts_decide_who_stays_and_groups_who_may_merge():
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.01, 1.0]])
    assert merge_vectors(vectors, 2, counts=torch.tensor([1, 5, 1, 5])).kept.tolist() == [1, 3]
    groups = torch.tensor([0, 1, 2, 2])
    merging = merge_vectors(vectors, 3, groups=groups)
    assert merging.owner.tolist() == [0, 1, 2, 2]
    tight = merge_vectors(vectors, 2, counts=torch.tensor([1, 2, 1, 1]), groups=groups)
    assert tight.kept.tolist() == [1, 2] and tight.owner.tolist() == [-1, 0, 1, 1] and tight.dropped == 1


def test_a_budget_that_is_met_changes_nothing():
    merging = merge_vectors(torch.randn(4, 3), 9)
    assert merging.kept.tolist() == [0, 1, 2, 3] == merging.owner.tolist() and math.isnan(merging.lowest)
    assert merge_vectors(torch.empty(0, 3), 1).kept.numel() == 0


@pytest.mark.parametrize(("name", "arguments"), [
    ("budget", {"budget": 0}), ("budget", {"budget": True}), ("block", {"block": 0}), ("counts", {"counts": torch.ones(3)}),
    ("groups", {"groups": torch.ones(5)}), ("vectors", {"vectors": torch.ones(4)}), ("vectors", {"vectors": torch.ones(4, 2).long()}),
    ("vectors", {"vectors": torch.full((4, 2), math.nan)}),
])
def test_merging_names_what_is_wrong(name, arguments):
    with pytest.raises(ValueError, match=name):
        merge_vectors(**{"vectors": torch.ones(4, 2), "budget": 2, **arguments})


def test_hidden_states_keep_counts_sources_and_values():
    memory = HiddenStateMemory(3, same_value=True)
    memory.add(torch.tensor([[1.0, 0, 0], [0.8, 0.2, 0], [0, 1, 0], [1, 0.01, 0]]), torch.tensor([7, 7, 8, 9]), [10, 11, 12, 13])
    saved = memory.snapshot()
    report = memory.consolidate(3)
    assert report == {"before": 4, "after": 3, "merged": 1, "dropped": 0, "lowest_similarity": report["lowest_similarity"]}
    assert memory.values.tolist() == [7, 8, 9] and memory.counts.tolist() == [2, 1, 1]
    assert memory.sources == [(10, 11), (12,), (13,)] and torch.allclose(memory.keys[0], torch.tensor([0.9, 0.1, 0]))
    memory.add(torch.tensor([[1.0, 0, 0]]), torch.tensor([7]))
    memory.consolidate(3)
    assert torch.allclose(memory.keys[0], torch.tensor([2.8 / 3, 0.2 / 3, 0])) and int(memory.counts.sum()) == 5
    memory.restore(saved)
    assert len(memory) == 4 and memory.sources == [(10,), (11,), (12,), (13,)] and memory.search(torch.eye(3)[:1], 2)[0].shape == (1, 2)
    with pytest.raises(ValueError, match="keys"):
        memory.add(torch.ones(1, 2), torch.ones(1))


def test_layout_and_case_do_not_count_and_words_do():
    a, b, c = text_vectors(["Reads the  file\nonce.", "reads THE file once.", "a model sleeps at night"])
    assert torch.allclose(a, b) and float(a @ c) < 0.3
    assert float(text_vectors([""]).norm()) <= 1.0
    store = TextMemory(["Reads the  file\nonce.", "a model sleeps at night", "reads THE file once.", "reads the file once."])
    saved = store.snapshot()
    store.consolidate(2)
    assert store.texts == ["Reads the  file\nonce.", "a model sleeps at night"] and store.counts.tolist() == [3, 1]
    assert store.search(["sleeps at night"], 1)[0].tolist() == [[1]]
    store.restore(saved)
    assert len(store) == 4


# ---- the strategy ----


class Guard:
    "A guard set whose answers are given."

    def __init__(self, *bits):
        self.bits = list(bits)

    def bits_per_byte(self, model):
        return self.bits.pop(0)


def a_store():
    return TextMemory(["one and the same", "one and the  same", "something else", "a third thing"])


def test_a_night_merges_and_rehearses_and_a_bad_one_is_undone():
    model, store = tiny(), a_store()
    context = SleepContext(LMModelState("tiny"), model, day=DAY, stores={"notes": store, "empty": TextMemory()})
    strategy = SemanticConsolidation(rehearsal_steps=2, memory_budget=0.75, rehearsal_max_forgetting=None)
    before, context.guard = hash_model(model), Guard(1.0, 1.5, 1.0)
    assert run_transaction(strategy, context).status == "rolled_back"
    assert hash_model(model) == before and len(store) == 4 and not context.state.semantic_memory
    context.guard = Guard(1.0, 1.01)
    report = run_transaction(strategy, context)
    assert report.status == "committed" and len(store) == 3 and hash_model(model) != before
    assert report.details["consolidated"] == 1 + len(DAY)
    assert set(context.state.semantic_memory) == {"memory:notes", "weights"}
    assert context.state.semantic_memory["weights"]["value"]["steps"] == 2


def test_memories_need_no_model_and_text_needs_no_memories():
    store = a_store()
    report = run_transaction(SemanticConsolidation(memory_budget=2), SleepContext(LMModelState("none"), stores={"notes": store}))
    assert report.status == "committed" and len(store) == 2 and report.details["weights"] == {"skipped": "no model is bound"}
    model = tiny()
    session = Session(model)
    session.score(DAY.flatten()[:40])
    night = SleepContext(LMModelState("tiny"), model, session)
    assert "less than 128 tokens" in run_transaction(SemanticConsolidation(), night).message
    report = run_transaction(SemanticConsolidation(rehearsal_tokens=16, rehearsal_steps=2), night)
    assert report.status == "committed" and report.details["consolidated"] == 2  # sequences of 16 among 40 tokens


def test_what_is_missing_is_said():
    context = SleepContext(LMModelState("tiny"), tiny(), day=DAY)
    assert "calibration" in run_transaction(SemanticConsolidation(rehearsal_method="stored_replay"), context).message
    assert "rehearsal_steps" in run_transaction(SemanticConsolidation(rehearsal_steps=0), context).message
    context.day = DAY.repeat(1, 9)  # longer than the model's positions
    report = run_transaction(SemanticConsolidation(), context)
    assert report.status == "failed" and "day must be" in report.message


def test_an_interrupted_night_leaves_everything_as_it_was(monkeypatch):
    model, store = tiny(), a_store()
    context = SleepContext(LMModelState("tiny"), model, day=DAY, stores={"notes": store})
    before = hash_model(model)

    def interrupted(self, student, new, old):
        raise KeyboardInterrupt

    monkeypatch.setattr(Rehearsal, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_transaction(SemanticConsolidation(rehearsal_method="naive"), context)
    assert hash_model(model) == before and len(store) == 4 and not context.state.semantic_memory


def test_lora_saves_less():
    def nbytes(method):
        strategy = SemanticConsolidation(rehearsal_method=method)
        saved = strategy.snapshot(SleepContext(LMModelState("tiny"), tiny(), day=DAY))
        return sum(getattr(part, "nbytes", 0) for part in saved._snapshots)

    assert 0 < nbytes("lora") < nbytes("replay")


@pytest.mark.parametrize(("option", "value"), [
    ("memory_budget", 0), ("memory_budget", 1.5), ("memory_budget", True), ("rehearsal_method", "magic"), ("rehearsal_steps", -1),
    ("rehearsal_batch", 1), ("rehearsal_tokens", 1.0), ("rehearsal_rate", 0), ("rehearsal_ratio", 1), ("rehearsal_max_forgetting", 0),
])
def test_options_are_checked_when_the_strategy_is_made(option, value):
    with pytest.raises(ValueError, match=option):
        SemanticConsolidation(**{option: value})


def test_the_controller_runs_it_in_deep_sleep_and_records_nothing_without_a_model():
    store = a_store()
    controller = AISleepController("tiny")
    controller.configure_deep_sleep(strategies=[OptimizationStrategy.SEMANTIC_CONSOLIDATION], memory_budget=3, rehearsal_steps=2)
    controller.initiate_sleep(SleepTrigger.MANUAL, SleepMode.DEEP_SLEEP)
    controller.wake_up()
    nothing = controller.last_report.strategies[0]
    assert nothing.status == "skipped" and nothing.details == {"consolidated": 0} and nothing.message == "no model is bound"
    with pytest.warns(UserWarning, match="no guard set"):
        controller.bind(tiny(), day=DAY, stores={"notes": store})
    controller.initiate_sleep(SleepTrigger.MANUAL, SleepMode.DEEP_SLEEP)
    assert controller.last_report.strategies[0].status == "committed" and len(store) == 3
