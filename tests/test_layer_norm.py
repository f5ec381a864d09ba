"""Recalibration of norms beyond its notebook: families, bounds, quantised models, a named teacher, repeatability."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ai_sleep_constructs import AISleepController, SleepMode, SleepTrigger, load_corpus, load_model
from ai_sleep_constructs.reference.recipe import TrainingConfig, token_streams
from ai_sleep_constructs.reference.architecture import attention_blocks, norm_parameters
from ai_sleep_constructs.sleep.guard import GuardSet, sample_sequences
from ai_sleep_constructs.sleep.hashing import hash_model
from ai_sleep_constructs.sleep.state import LMModelState
from ai_sleep_constructs.sleep.strategies.base import SleepContext, run_transaction
from ai_sleep_constructs.sleep.strategies.head_pruning import AttentionHeadPruning, choose_groups, head_importance, prune_groups
from ai_sleep_constructs.sleep.strategies.layer_norm import LayerNormRecalibration, fit_norms, last_hidden_states
from ai_sleep_constructs.workbench.small_models import ARCHITECTURES, small_model, train_small

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SMALL = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 128, **ENDS}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=48, n_layer=2, n_head=6, n_positions=128, **ENDS)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
}
TEXT = torch.randint(1, 128, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FAMILIES)
def tiny(request):
    torch.manual_seed(0)
    model = FAMILIES[request.param]().eval()
    with torch.no_grad():  # random weights say almost the same of every text
        for block in attention_blocks(model):
            block.out.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def reference():
    return load_model("reference")


@pytest.fixture(scope="module")
def calibration(reference):
    return sample_sequences(reference.tokenizer, load_corpus("python", "train", max_bytes=80_000).texts, 8, 128)


@pytest.fixture(scope="module")
def guard(reference):
    return GuardSet.of_texts(reference.tokenizer, load_corpus("python", "guard", max_bytes=40_000).texts, sequences=8, length=128)


def others(model):
    "All tensors that are not of a norm."
    norms = set(norm_parameters(model))
    return {name: p.detach().clone() for name, p in model.named_parameters() if name not in norms}


def pruned(model):
    copied = copy.deepcopy(model)
    for block in attention_blocks(copied):
        prune_groups(block, [0])
    return copied


# ---- the fit ----


def test_every_family_moves_towards_its_teacher_by_its_norms_alone(tiny):
    teacher = last_hidden_states(tiny, TEXT)
    student = pruned(tiny)
    fixed, norms = others(student), {name: p.detach().clone() for name, p in norm_parameters(student).items()}
    report = fit_norms(student, TEXT, teacher, steps=20)
    assert report["steps"] == 20 and report["loss_after"] < 0.9 * report["loss_before"]
    assert all(torch.equal(p, fixed[name]) for name, p in others(student).items())
    moved = norm_parameters(student)
    assert all(not torch.equal(p, norms[name]) for name, p in moved.items())
    assert any(name.endswith("bias") for name in moved) == isinstance(student, GPT2LMHeadModel)


def test_the_same_fit_gives_the_same_bits_and_the_dense_model_has_nothing_to_learn(tiny):
    teacher, first, second = last_hidden_states(tiny, TEXT), pruned(tiny), pruned(tiny)
    assert fit_norms(first, TEXT, teacher, steps=4) == fit_norms(second, TEXT, teacher, steps=4)
    assert hash_model(first) == hash_model(second)
    before = hash_model(tiny)
    assert fit_norms(tiny, TEXT, teacher, steps=4)["steps"] == 0 and hash_model(tiny) == before


def test_named_parameters_are_fitted_instead_of_the_norms(tiny):
    teacher, student = last_hidden_states(tiny, TEXT), pruned(tiny)
    outs = {id(block.out.weight) for block in attention_blocks(student)}
    only = {name: p for name, p in student.named_parameters() if id(p) in outs}
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    assert fit_norms(student, TEXT, teacher, steps=4, parameters=only)["steps"] == 4
    assert {name for name, p in student.named_parameters() if not torch.equal(p, before[name])} == set(only)


def test_half_of_the_heads_gone_a_good_part_comes_back(reference, calibration, guard):
    model = copy.deepcopy(reference.model)
    teacher, dense = last_hidden_states(model, calibration), guard.bits_per_byte(model)
    blocks = attention_blocks(model)
    for layer, groups in choose_groups(head_importance(model, calibration), 0.5).items():
        prune_groups(blocks[layer], groups)
    damaged = guard.bits_per_byte(model)
    fit_norms(model, calibration, teacher, steps=16, learning_rate=2e-2)
    assert (damaged - guard.bits_per_byte(model)) / (damaged - dense) > 0.15


# ---- its bounds ----


def test_the_teacher_takes_no_more_memory_than_allowed(tiny):
    whole = last_hidden_states(tiny, TEXT)
    one = whole[0].nbytes / 2**20
    bounded = last_hidden_states(tiny, TEXT, memory=2.5 * one)
    assert len(bounded) == 2 and torch.equal(bounded, last_hidden_states(tiny, TEXT[:2]))
    with pytest.raises(ValueError, match=r"memory must hold the states of one sequence"):
        last_hidden_states(tiny, TEXT, memory=0.5 * one)


def test_a_night_with_a_small_teacher_fits_to_what_it_kept(reference, calibration):
    model = copy.deepcopy(reference.model)
    context = SleepContext(LMModelState("m"), model, calibration=calibration)
    one = 128 * model.config.hidden_size * 4 / 2**20
    strategy = LayerNormRecalibration(recalibration_steps=2, recalibration_memory=3 * one)
    strategy.before_night(context)
    assert len(context.memo["teacher"]) == 3
    run_transaction(AttentionHeadPruning(pruning_fraction=0.3), context)
    assert run_transaction(strategy, context).details["steps"] == 2


def test_a_night_whose_teacher_does_not_fit_says_so_and_changes_nothing(reference, calibration, guard):
    model = copy.deepcopy(reference.model)
    controller = AISleepController("m")
    controller.bind(model, guard=guard, calibration=calibration)
    controller.configure_deep_sleep(strategies=[LayerNormRecalibration], recalibration_memory=0.001)
    before = hash_model(model)
    controller.initiate_sleep(SleepTrigger.MANUAL, SleepMode.DEEP_SLEEP)
    report = controller.last_report.strategies[0]
    assert report.status == "failed" and "memory must hold" in report.message and hash_model(model) == before


@pytest.mark.parametrize("options", [
    {"recalibration_memory": 0}, {"recalibration_memory": float("inf")}, {"recalibration_memory": True},
    {"recalibration_objective": "text", "recalibration_teacher": "reference"}, {"recalibration_teacher": ""},
    {"recalibration_rate": 0}, {"recalibration_steps": 0}, {"recalibration_objective": "labels"},
])
def test_bad_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(reversed(options))):
        LayerNormRecalibration(**options)


# ---- quantised models ----


def test_a_model_loaded_in_four_bits_is_fitted_to_the_one_it_was(reference, calibration, guard):
    pytest.importorskip("bitsandbytes")
    model = load_model("reference", quantization="4bit").model
    packed = {name: p.detach().clone() for name, p in model.named_parameters() if not p.is_floating_point()}
    fixed = others(model)
    assert len(packed) == 42
    controller = AISleepController("four bits")
    controller.bind(model, guard=guard, calibration=calibration)
    controller.configure_deep_sleep(
        strategies=[LayerNormRecalibration], recalibration_teacher="reference", recalibration_steps=12, recalibration_rate=4e-3,
    )
    controller.initiate_sleep(SleepTrigger.MANUAL, SleepMode.DEEP_SLEEP)
    report = controller.last_report.strategies[0]
    assert report.status == "committed", report.message
    assert report.details["steps"] == 12 and report.details["loss_after"] < 0.97 * report.details["loss_before"]
    assert all(torch.equal(p, packed[name]) for name, p in model.named_parameters() if name in packed)
    assert all(torch.equal(p, fixed[name]) for name, p in others(model).items())


def test_a_teacher_with_another_vocabulary_is_refused(reference, calibration, guard):
    context = SleepContext(LMModelState("m"), reference.model, guard=guard, calibration=calibration)
    with pytest.raises(ValueError, match=r"recalibration_teacher: 'reference-gpt2' has another output embedding"):
        LayerNormRecalibration(recalibration_teacher="reference-gpt2").before_night(context)


# ---- small models ----


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_small_models_learn_and_repeat(family, reference):
    streams = token_streams(load_corpus("python", "train", max_bytes=60_000), reference.tokenizer)
    config = TrainingConfig(hidden_size=32, intermediate_size=64, layers=1, heads=4, kv_heads=2, positions=64, contexts=((0.0, 64),),
                            steps=8, batch_tokens=256, warmup=2, learning_rate=0.02)
    runs = []
    for _ in range(2):
        model = small_model(family, reference.tokenizer, config)
        runs.append((train_small(model, streams, config), hash_model(model)))
    assert runs[0] == runs[1] and runs[0][0][-1] < runs[0][0][0] - 0.2
    blocks = attention_blocks(model)
    assert type(model).__name__.lower().startswith(family) and blocks[0].groups == (4 if family in ("gpt2", "llama") else 2)
    other = small_model(family, reference.tokenizer, TrainingConfig(**{**vars(config), "seed": 1}))
    assert not torch.equal(other.get_input_embeddings().weight, small_model(family, reference.tokenizer, config).get_input_embeddings().weight)


def test_an_unknown_family_is_named(reference):
    with pytest.raises(ValueError, match=r"family must be one of gpt2, .*got 'falcon'"):
        small_model("falcon", reference.tokenizer, TrainingConfig())
