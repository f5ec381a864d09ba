"""The record of a model's nights: transitions, hashes, clipping, bounds, and files that come back exactly."""

import math
import os
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ai_sleep_constructs.sleep.archive import read_archive, write_archive
from ai_sleep_constructs.sleep.clipping import clip_stored
from ai_sleep_constructs.sleep.hashing import hash_model, hash_tensors
from ai_sleep_constructs.sleep.modes import OptimizationStrategy, SleepMode, SleepTrigger, can_transition
from ai_sleep_constructs.sleep.state import LMModelState, StateSnapshot

AWAKE, LIGHT, DEEP, BETWEEN = SleepMode


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).to(dtype)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# modes


def test_values_of_the_enums() -> None:
    assert [m.value for m in SleepMode] == ["awake", "light_sleep", "deep_sleep", "transitioning"]
    assert len(SleepTrigger) == 7 and len(OptimizationStrategy) == 7
    for enum in (SleepMode, SleepTrigger, OptimizationStrategy):
        for member in enum:
            assert member.value == member.name.lower() == str(member)
            assert member.value in member._repr_markdown_()


def test_transition_table() -> None:
    direct = {(AWAKE, LIGHT), (LIGHT, AWAKE), (LIGHT, DEEP), (DEEP, LIGHT)}
    for old in SleepMode:
        for new in SleepMode:
            expected = old is new or BETWEEN in (old, new) or (old, new) in direct
            assert can_transition(old, new) is expected, (old, new)


# hashing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_hash_sees_every_dtype(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    same = hash_tensors([("w", tensor.clone())])
    assert hash_tensors([("w", tensor)]) == same and len(same) == 64
    other = tensor.clone().view(torch.uint8)
    other[0, 0] ^= 1
    assert hash_tensors([("w", other.view(dtype))]) != same
    assert hash_tensors([("v", tensor)]) != same
    assert hash_tensors([("w", tensor.reshape(4))]) != same


def test_hash_tells_dtypes_apart_that_share_their_bytes() -> None:
    assert hash_tensors([("w", torch.zeros(2, dtype=torch.float16))]) != hash_tensors([("w", torch.zeros(2, dtype=torch.bfloat16))])


def test_hash_of_views_is_that_of_their_values() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert hash_tensors([("w", tensor.T)]) == hash_tensors([("w", tensor.T.contiguous())]) != hash_tensors([("w", tensor.reshape(4, 3))])
    assert hash_tensors([("s", torch.tensor(1.0))]) != hash_tensors([("s", torch.tensor([1.0]))])


def test_hash_refuses_what_is_no_set_of_tensors() -> None:
    with pytest.raises(TypeError, match="'w' is a list"):
        hash_tensors([("w", [1.0])])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="'w' comes twice"):
        hash_tensors([("w", torch.ones(1)), ("w", torch.ones(1))])


def test_hash_of_a_model_includes_buffers_without_a_checkpoint_entry() -> None:
    model = network(torch.bfloat16)
    model.register_buffer("angles", torch.ones(3), persistent=False)
    before = hash_model(model)
    model.eval()
    assert hash_model(model) == before
    model.angles += 1  # type: ignore[operator]
    assert hash_model(model) != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_hash_does_not_depend_on_the_device() -> None:
    model = network(torch.bfloat16)
    before = hash_model(model)
    assert hash_model(model.cuda()) == before


# transitions and history


def test_transitions_leave_times_and_snapshots() -> None:
    state = LMModelState("m")
    begin = state.last_transition_time
    assert begin.tzinfo is UTC and state.current_mode is AWAKE and state.state_history == []
    for mode in (LIGHT, DEEP, LIGHT, AWAKE):
        state.transition_to(mode)
    assert [s.sleep_mode for s in state.state_history] == [LIGHT, DEEP, LIGHT, AWAKE]
    assert state.state_history[1].metadata == {"from": "light_sleep", "to": "deep_sleep"}
    times = [begin, *(s.timestamp for s in state.state_history)]
    assert times == sorted(times) and state.last_transition_time == times[-1]
    state.transition_to(AWAKE)
    assert len(state.state_history) == 4 and state.last_transition_time == times[-1], "the same mode is a no-op"


@pytest.mark.parametrize(("old", "new"), [(AWAKE, DEEP), (DEEP, AWAKE)])
def test_forbidden_transition_names_both_and_what_is_allowed(old: SleepMode, new: SleepMode) -> None:
    state = LMModelState("m", old)
    with pytest.raises(ValueError, match=f"from {old} to {new}.*light_sleep, transitioning"):
        state.transition_to(new)
    assert state.current_mode is old and state.state_history == []


def test_a_cycle_is_counted_once_however_deep_it_goes() -> None:
    state = LMModelState("m", track_history=False)
    for mode in (BETWEEN, LIGHT, BETWEEN, DEEP, LIGHT, BETWEEN, AWAKE):
        state.transition_to(mode)
    assert state.sleep_cycle_count == 1 and state.state_history == []
    state.transition_to(BETWEEN)
    state.transition_to(AWAKE)
    assert state.sleep_cycle_count == 1
    state.transition_to(LIGHT)
    assert state.sleep_cycle_count == 2 and state.get_state_summary()["sleep_cycle_count"] == 2


def test_a_failing_snapshot_changes_no_mode() -> None:
    state = LMModelState("m").bind(nn.Linear(2, 2, device="meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        state.transition_to(LIGHT)
    assert state.current_mode is AWAKE and state.sleep_cycle_count == 0


def test_history_and_metrics_are_bounded() -> None:
    state = LMModelState("m", history_limit=5, metrics_limit=3)
    for i in range(12):
        state.record_metric("loss", i)
        state.create_snapshot({"i": i})
    assert [s.metadata["i"] for s in state.state_history] == [7, 8, 9, 10, 11]
    assert list(state.performance_metrics["loss"]) == [9, 10, 11] and state.state_history[-1].metrics == {"loss": 11.0}
    assert isinstance(LMModelState("n", track_history=False).create_snapshot(), StateSnapshot)


@pytest.mark.parametrize("arguments", [
    {"history_limit": 0}, {"history_limit": 2.0}, {"metrics_limit": True}, {"initial_mode": "awake"},
])
def test_bad_options_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
        LMModelState("m", **arguments)


# the records


def test_records_have_the_documented_shapes() -> None:
    state = LMModelState("m")
    state.update_kv_cache("0", keys=[1], values=[2])
    state.update_kv_cache("1", keys=[3], values=[4])
    assert state.kv_cache["0"]["keys"] == [1] and state.kv_cache["0"]["values"] == [2]
    state.clear_kv_cache(["0", "unknown"])
    assert list(state.kv_cache) == ["1"]
    with pytest.raises(TypeError, match="layer_ids"):
        state.clear_kv_cache("1")  # type: ignore[arg-type]
    state.clear_kv_cache()
    assert state.kv_cache == {}
    state.prune_attention_heads("0", [3, 1, 3])
    state.prune_attention_heads("0", np.array([2, 1]))  # type: ignore[arg-type]
    assert state.attention_heads["0"]["pruned"] == [1, 2, 3]
    for bad in ([-1], [1.5], [True], "3"):
        with pytest.raises(ValueError, match="head_ids of layer '0'"):
            state.prune_attention_heads("0", bad)  # type: ignore[arg-type]
    assert state.attention_heads["0"]["pruned"] == [1, 2, 3]
    state.update_layer_norm("0", gamma=1.5, beta=0.5)
    assert state.layer_norms["0"] == {"gamma": 1.5, "beta": 0.5}
    with pytest.raises(TypeError, match="gamma of layer '0'"):
        state.update_layer_norm("0", gamma="1", beta=0)  # type: ignore[arg-type]
    state.consolidate_semantic_memory("k", "v")
    assert state.semantic_memory["k"]["value"] == "v" and state.semantic_memory["k"]["timestamp"].tzinfo is UTC
    with pytest.raises(TypeError, match="'loss'"):
        state.record_metric("loss", "high")  # type: ignore[arg-type]
    summary = state.get_state_summary()
    assert summary["model_id"] == "m" and summary["current_mode"] == "awake" and summary["pruned_heads"] == 3
    assert "| pruned heads | 3 |" in state._repr_markdown_()


def test_hash_of_an_unbound_state_follows_heads_and_norms() -> None:
    state = LMModelState("m")
    hashes = [state.parameters_hash]
    state.prune_attention_heads("0", [1])
    hashes.append(state.parameters_hash)
    state.update_layer_norm("0", np.ones(4, dtype=np.float32), 0.0)
    hashes.append(state.parameters_hash)
    state.update_layer_norm("0", np.ones(4, dtype=np.float64), 0.0)
    hashes.append(state.parameters_hash)
    assert len(set(hashes)) == 4
    state.record_metric("loss", 1)
    assert state.parameters_hash == hashes[-1]


def test_bind_reads_the_model_and_can_be_undone() -> None:
    state, model = LMModelState("m"), network()
    unbound = state.parameters_hash
    assert state.bind(model) is state and state.model is model and state.parameters_hash == hash_model(model)
    assert state.create_snapshot().parameters_hash == hash_model(model)
    assert state.bind(None).parameters_hash == unbound
    with pytest.raises(TypeError, match="model must be"):
        state.bind("gpt2")  # type: ignore[arg-type]
    assert LMModelState("m", hash_parameters=False).create_snapshot().parameters_hash == ""


# clipping


def test_stored_gradients_are_clipped_by_their_global_norm() -> None:
    state = LMModelState("m")
    given = {"list": [[3.0], [0.0]], "array": np.array([4.0, 0.0], dtype=np.float32), "tensor": torch.tensor([12.0, 0.0], dtype=torch.bfloat16)}
    for name, gradient in given.items():
        state.store_gradient(name, gradient)
    assert state.clip_gradients(6.5) == {"list": 3.0, "array": 4.0, "tensor": 12.0}
    assert state.gradients["list"] == [[1.5], [0.0]] and state.gradients["array"].tolist() == [2.0, 0.0]
    assert state.gradients["array"].dtype == np.float32 and state.gradients["tensor"].dtype == torch.bfloat16
    assert given["array"].tolist() == [4.0, 0.0], "what was given stays as it was"
    assert state.clip_gradients(6.5) == {"list": 1.5, "array": 2.0, "tensor": 6.0} and state.gradients["list"] == [[1.5], [0.0]]


def test_clipping_takes_integers_and_what_overflows_float32() -> None:
    clipped, norms = clip_stored({"a": [3, 4], "b": np.array([0, 12]), "c": np.array([0.0])}, 1.0)
    assert norms == {"a": 5.0, "b": 12.0, "c": 0.0} and np.allclose([*clipped["a"], *clipped["b"]], np.array([3, 4, 0, 12]) / 13)
    clipped, _ = clip_stored({"a": torch.full((2,), 1e30)}, 1.0)
    assert torch.allclose(clipped["a"].norm(), torch.tensor(1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_gradient_changes_none(bad: float) -> None:
    state = LMModelState("m")
    state.store_gradient("good", [30.0])
    state.store_gradient("sick", np.array([1.0, bad]))
    with pytest.raises(ValueError, match="'sick' is not finite"):
        state.clip_gradients()
    assert state.gradients["good"] == [30.0]
    model = network()
    model(torch.randn(8, 6)).sum().backward()
    model[2].bias.grad.fill_(bad)
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(ValueError, match=r"'2\.bias' is not finite"):
        LMModelState("m").bind(model).clip_gradients(1e-3)
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters() if p.grad is not None and n != "2.bias")
    state.store_gradient("sick", "text")
    with pytest.raises(TypeError, match="'sick'"):
        state.clip_gradients()


@pytest.mark.parametrize("max_norm", [0, -1, math.nan, math.inf, "1", True, None])
def test_bad_max_norm(max_norm: Any) -> None:
    for state in (LMModelState("m"), LMModelState("m").bind(network())):
        with pytest.raises(ValueError, match="max_norm"):
            state.clip_gradients(max_norm)


def test_a_bound_model_is_clipped_for_real() -> None:
    model, twin = network(), network()
    for net in (model, twin):
        torch.manual_seed(1)
        (50 * net(torch.randn(8, 6))).square().mean().backward()
    state = LMModelState("m").bind(model)
    state.store_gradient("stored", [100.0])
    norms = state.clip_gradients(0.5)
    expected = {n: float(p.grad.norm()) for n, p in twin.named_parameters() if p.grad is not None}
    assert norms.keys() == expected.keys() and all(math.isclose(norms[n], expected[n], rel_tol=1e-5) for n in norms)
    nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert state.gradients == {"stored": [100.0]}
    small = state.clip_gradients(10.0)
    assert math.isclose(math.hypot(*small.values()), 0.5, rel_tol=1e-4), "below the limit nothing is scaled"


def test_clipping_a_model_without_gradients_is_empty() -> None:
    assert LMModelState("m").bind(network()).clip_gradients() == {}


# files


def full_state() -> LMModelState:
    state = LMModelState("médium\n", history_limit=7, metrics_limit=4, hash_parameters=False)
    for i in range(6):
        state.record_metric("loss", i / 3)
    state.record_metric("gap", math.nan)
    state.record_metric("gap", -math.inf)
    state.transition_to(LIGHT)
    state.update_kv_cache("layer_0", torch.arange(6, dtype=torch.bfloat16).reshape(1, 2, 3).transpose(1, 2), np.zeros((0, 4), dtype=np.int16))
    state.update_kv_cache("layer_1", [1.5, None], (1, "two", {3: [True]}))
    state.store_gradient("w", np.array(2.5))
    state.store_gradient("v", np.float32(0.1))
    state.prune_attention_heads("layer_0", [2, 0])
    state.update_layer_norm("layer_0", torch.ones(3, dtype=torch.float16), 0.25)
    state.consolidate_semantic_memory("topic", {"$": "tricky", "when": datetime(2026, 1, 2, tzinfo=UTC), "text": "a\ud800b"})
    state.create_snapshot({"note": (1, 2), "vector": np.eye(2, dtype=np.uint8)})
    return state


def same(a: Any, b: Any) -> bool:
    """Equal values of equal types, dtypes and shapes; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(map(same, a, b)) and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
    if isinstance(a, StateSnapshot):
        return same(vars(a), vars(b))
    return bool(a == b or (a != a and b != b))


def test_everything_comes_back_exactly(tmp_path: Path) -> None:
    state = full_state()
    state.save_state(tmp_path / "night.state")
    again = LMModelState.load_state(str(tmp_path / "night.state"))
    mine, theirs = vars(state), vars(again)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not same(mine[name], theirs[name])] == []
    again.transition_to(DEEP)
    assert again.sleep_cycle_count == 1, "the loaded state knows that it sleeps"
    assert names(tmp_path) == ["night.state"]


def test_saving_twice_gives_the_same_bytes_and_a_bound_model_is_left_out(tmp_path: Path) -> None:
    state = full_state()
    state.save_state(tmp_path / "a")
    state.bind(network()).save_state(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert LMModelState.load_state(tmp_path / "b").model is None


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", np.array([object()]), np.array(1j), [lambda: 0], torch.ones(2).to_sparse()])
def test_a_value_without_an_exact_form_is_named_before_anything_is_written(tmp_path: Path, value: Any) -> None:
    state, path = LMModelState("m"), tmp_path / "s"
    state.save_state(path)
    before = path.read_bytes()
    state.consolidate_semantic_memory("odd one", value)
    with pytest.raises(TypeError, match="odd one"):
        state.save_state(path)
    assert path.read_bytes() == before and names(tmp_path) == ["s"]


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        LMModelState.load_state(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError):
        LMModelState.load_state(tmp_path)
    with pytest.raises(FileNotFoundError):
        LMModelState("m").save_state(tmp_path / "no" / "folder")
    path = tmp_path / "s"
    full_state().save_state(path)
    whole = path.read_bytes()
    for cut in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged"):
            LMModelState.load_state(path)
    path.write_bytes(b"\x80\x04\x95 a pickle, say")
    with pytest.raises(ValueError, match="damaged"):
        LMModelState.load_state(path)
    write_archive(path, {"kind": "something else"})
    with pytest.raises(ValueError, match="'something else', expected 'LMModelState/1'"):
        LMModelState.load_state(path)


def test_a_safetensors_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no archive"):
        read_archive(tmp_path / "model.safetensors")


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, path = LMModelState("m"), tmp_path / "s"
    state.save_state(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        full_state().save_state(path)
    assert path.read_bytes() == before and names(tmp_path) == ["s"]
