"""What a night must not do to a model: undo its training, learn its damage, mix up positions, change modes or generators."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config

from ai_sleep_constructs.reference.architecture import evaluating
from ai_sleep_constructs.sleep.controller import AISleepController
from ai_sleep_constructs.sleep.eviction import observe
from ai_sleep_constructs.sleep.guard import GuardSet
from ai_sleep_constructs.sleep.head_surgery import check_prunable
from ai_sleep_constructs.sleep.health import HealthBaseline
from ai_sleep_constructs.sleep.kv_quantization import pack_cache
from ai_sleep_constructs.sleep.merging import HiddenStateMemory
from ai_sleep_constructs.sleep.modes import OptimizationStrategy, SleepMode, SleepTrigger
from ai_sleep_constructs.sleep.rehearsal import dream, rehearse
from ai_sleep_constructs.sleep.session import Session, check_window, sliding_window
from ai_sleep_constructs.sleep.strategies.layer_norm import last_hidden_states

PATCH, NORMS, MERGE, CACHE = (
    OptimizationStrategy.SECURITY_PATCHING, OptimizationStrategy.LAYER_NORM_RECALIBRATION, OptimizationStrategy.SEMANTIC_CONSOLIDATION,
    OptimizationStrategy.KV_CACHE_MANAGEMENT,
)
SIZES = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}


def tiny() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss(model: Any) -> float:
    with torch.no_grad():
        return float(model(input_ids=ids(4, 32), labels=ids(4, 32)).loss)


def night(controller: AISleepController, mode: SleepMode = SleepMode.DEEP_SLEEP) -> Any:
    assert controller.initiate_sleep(SleepTrigger.MANUAL, mode), controller.last_refusal
    controller.wake_up()
    return controller.last_report


# training is no damage


@pytest.mark.parametrize("trained", ["model.layers.2.mlp", "norm"])
def test_patching_does_not_undo_training(trained: str, tmp_path: Any) -> None:
    model = tiny()
    parts = [p for name, p in model.named_parameters() if trained in name]
    optimizer = torch.optim.Adam(parts, lr=1e-2)
    health = HealthBaseline.of(model, ids(4, 32), backup=tmp_path / "backup.safetensors")
    controller = AISleepController("m")
    controller.bind(model, calibration=ids(4, 32), optimizer=optimizer, health=health)
    controller.configure_deep_sleep(strategies=[PATCH])
    for _ in range(15):
        optimizer.zero_grad()
        model(input_ids=ids(4, 32), labels=ids(4, 32)).loss.backward()
        optimizer.step()
    before = [p.detach().clone() for p in parts]
    report = night(controller)
    assert all(torch.equal(a, b) for a, b in zip(before, parts, strict=True)) and not report.strategies[0].details["repaired"]
    assert not health.differing(model), "and what was learnt is the record of the next night"
    frozen = next(p for name, p in model.named_parameters() if "layers.0.self_attn.v_proj" in name)
    kept = frozen.detach().clone()
    with torch.no_grad():
        frozen[3] += 1.0
        parts[0].view(-1)[0] = float("nan")
    repaired = night(controller).strategies[0].details["repaired"]
    assert torch.equal(frozen, kept) and bool(parts[0].isfinite().all()) and len(repaired) == 2, "tampering elsewhere and a NaN are still repaired"


def test_norms_learn_from_the_repaired_model() -> None:
    model = tiny()
    calibration = ids(8, 32)
    controller = AISleepController("m")
    controller.bind(model, calibration=calibration, health=HealthBaseline.of(model, calibration))
    controller.guard = None
    controller.configure_deep_sleep(strategies=[PATCH, NORMS], recalibration_steps=20)
    clean = last_hidden_states(model, calibration)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0] *= 40
    report = night(controller)
    assert report.strategies[0].details["repaired"]
    torch.testing.assert_close(last_hidden_states(model, calibration), clean, atol=1e-4, rtol=1e-3)


# modes and generators


def test_every_module_keeps_its_own_mode() -> None:
    model = tiny().train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    guard = GuardSet.__new__(GuardSet)
    guard.sequences, guard.batch_size = ids(2, 16), 2
    for measure in (
        lambda: dream(model, 2, 8, seed=0),
        lambda: last_hidden_states(model, ids(2, 16)),
        lambda: rehearse(model, ids(4, 16), "naive", steps=1, learning_rate=1e-4, batch_size=2, ratio=0.5, seed=0),
        lambda: guard._mean(model, 1, lambda net, rows: net(input_ids=rows, labels=rows).loss),
    ):
        measure()
        assert [m.training for m in model.modules()] == modes
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert [m.training for m in model.modules()] == modes


def test_rehearsal_leaves_the_generators_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    rehearse(tiny_with(state), ids(4, 16), "naive", steps=1, learning_rate=1e-4, batch_size=2, ratio=0.5, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def tiny_with(state: torch.Tensor) -> Any:
    model = tiny()
    torch.set_rng_state(state)
    return model


# the same text twice


def test_what_was_rehearsed_is_not_rehearsed_again() -> None:
    model = tiny()
    session = Session(model)
    controller = AISleepController("m")
    controller.bind(model, session=session, calibration=ids(4, 32))
    controller.guard = None
    controller.configure_deep_sleep(strategies=[MERGE], rehearsal_method="naive", rehearsal_tokens=16, rehearsal_steps=2, rehearsal_batch=2)
    session.read(ids(1, 64)[0])
    statuses = [night(controller).strategies[0].status for _ in range(2)]
    assert statuses == ["committed", "skipped"] and "nothing new" in controller.last_report.strategies[0].message
    session.read(ids(1, 32, seed=2)[0])
    assert night(controller).strategies[0].details["weights"]["sequences"] == 2, "the new 32 tokens only"


# caches


@pytest.mark.parametrize(("options", "window"), [
    ({"sliding_window": 16}, 16), ({"sliding_window": None}, None), ({"sliding_window": 256}, None), ({}, None),
])
def test_a_window_that_can_bite_is_known(options: dict[str, Any], window: int | None) -> None:
    with torch.device("meta"):
        assert sliding_window(MistralForCausalLM(MistralConfig(**SIZES | options))) == window
    qwen = type("Model", (), {"config": Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=16)})()
    assert sliding_window(qwen) is None
    qwen.config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert sliding_window(qwen) == 16


def test_a_cache_under_a_sliding_window_is_not_shortened() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)).eval()
    session = Session(model)
    session.read(ids(1, 60)[0])
    held = session.cache_tokens
    controller = AISleepController("m")
    controller.bind(model, session=session)
    controller.configure_light_sleep(strategies=[CACHE], kv_cache_retention=10)
    done = night(controller, SleepMode.LIGHT_SLEEP).strategies[0]
    assert done.status == "skipped" and "sliding window of 16" in done.message and session.cache_tokens == held
    with pytest.raises(ValueError, match="sliding window of 16"):
        check_window(model)


def test_snapkv_without_a_memory_of_tokens_says_so() -> None:
    session = Session(tiny(), remember=0)
    session.read(ids(1, 20)[0])
    with pytest.raises(ValueError, match="remember=0"):
        observe(session.model, session.cache, session.recent, session.position)


def test_a_model_that_fills_no_cache_is_refused() -> None:
    model = tiny().train()
    model.gradient_checkpointing_enable()
    session = Session(model)
    with pytest.raises(RuntimeError, match="gradient_checkpointing_disable"):
        session.read(ids(1, 16)[0])
    assert session.position == 0 and session.cache_tokens == 0 and session.served == 0


def test_a_packed_cache_that_is_too_long_is_found_and_shortened() -> None:
    model = tiny()
    session = Session(model)
    session.read(ids(1, 96)[0])
    pack_cache(session.cache, 8)
    controller = AISleepController("m")
    controller.bind(model, session=session, calibration=ids(4, 32), health=HealthBaseline.of(model, ids(4, 32)))
    controller.configure_deep_sleep(strategies=[PATCH], cache_limit_tokens=32)
    details = night(controller).strategies[0].details
    assert [f["kind"] for f in details["repaired"]] == ["oversize_cache"] and session.cache_tokens == 32
    assert session.cache.broken == 4, "the first four are followed by a gap"
    assert torch.isfinite(session.read(ids(1, 4)[0])).all()


# small ones


def test_ids_of_dropped_entries_are_not_given_again() -> None:
    memory = HiddenStateMemory(4)
    memory.add(torch.eye(4), torch.arange(4))
    memory.consolidate(2)
    memory.add(torch.eye(4)[:2] * -1, torch.arange(2))
    every = [i for held in memory.sources for i in held]
    assert len(set(every)) == len(every) and max(every) == 5


def test_a_projection_without_plain_weights_is_named() -> None:
    from ai_sleep_constructs.reference.architecture import attention_blocks

    model = tiny()
    block = attention_blocks(model)[0]
    block.module.k_proj = torch.nn.Module()
    with pytest.raises(TypeError, match="Module holds packed weights"):
        check_prunable(block)


def test_no_cache_is_unpacked_for_nothing() -> None:
    model = tiny()
    session = Session(model)
    session.read(ids(1, 64)[0])
    pack_cache(session.cache, 4)
    size = session.cache_bytes
    controller = AISleepController("m")
    controller.bind(model, session=session, calibration=ids(4, 32))
    controller.configure_deep_sleep(strategies=[OptimizationStrategy.ATTENTION_HEAD_PRUNING], pruning_fraction=0.01)
    assert not night(controller).strategies[0].details["pruned"] and session.cache_bytes == size
