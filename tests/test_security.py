"""Security patching: faults in every family, repairs and their limits, healthy models, and records that were tampered with."""

import copy
import json

import pytest
import torch
from ai_sleep_constructs.sleep.controller import AISleepController
from ai_sleep_constructs.sleep.examination import examine
from ai_sleep_constructs.sleep.hashing import hash_model
from ai_sleep_constructs.sleep.health import HealthBaseline
from ai_sleep_constructs.sleep.health_checks import Check, Patient
from ai_sleep_constructs.sleep.modes import SleepMode, SleepTrigger
from ai_sleep_constructs.sleep.session import Session
from ai_sleep_constructs.sleep.state import LMModelState
from ai_sleep_constructs.sleep.strategies.base import SleepContext, StrategyReport, run_transaction
from ai_sleep_constructs.sleep.strategies.security_patching import SecurityPatching
from ai_sleep_constructs.sleep.vitals import gradient_ranges, take_vitals
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=256, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0, pad_token_id=0)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=4)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16)),
}
TEXT = torch.randint(1, 256, (3, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=FAMILIES)
def any_model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return FAMILIES["llama"]().eval()


def kinds(model, baseline=None, **more):
    return [f.kind for f in examine(Patient(model, baseline, **more))[0]]


def matrix(model):
    "A matrix inside the second layer with its name."
    return next((n, p) for n, p in model.named_parameters() if p.ndim == 2 and (".1.mlp" in n))


def patch(model, baseline=None, **more):
    return run_transaction(SecurityPatching(), SleepContext(LMModelState("m"), model, health=baseline, **more))


# ---- probes ----


def test_looking_changes_nothing(any_model):
    any_model.train()
    next(any_model.children()).eval()
    modes = [m.training for m in any_model.modules()]
    before, random, used = hash_model(any_model), torch.get_rng_state(), any_model.config._attn_implementation
    vitals = take_vitals(any_model, TEXT)
    gradient_ranges(any_model, TEXT)
    assert len(vitals.entropy) == 2 and len(vitals.entropy[0]) == 4 and len(vitals.activations) >= 6
    assert hash_model(any_model) == before and torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in any_model.modules()] == modes and any_model.config._attn_implementation == used
    assert all(p.grad is None for p in any_model.parameters())


def test_looking_leaves_nothing_behind_when_the_model_raises(llama):
    llama.train()
    broken = llama.model.layers[1].mlp.register_forward_pre_hook(lambda m, a: (_ for _ in ()).throw(RuntimeError("no")))
    for probe in (take_vitals, gradient_ranges):
        with pytest.raises(RuntimeError):
            probe(llama, TEXT)
    broken.remove()
    assert llama.training and llama.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks for m in llama.modules())


def test_entropy_is_that_of_the_attention(any_model):
    any_model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = any_model(input_ids=TEXT, output_attentions=True).attentions[1][:, :, 8:]
    expected = torch.special.entr(weights).sum(-1).mean((0, 2))
    any_model.set_attn_implementation("sdpa")
    assert torch.allclose(torch.tensor(take_vitals(any_model, TEXT).entropy[1]), expected, atol=1e-4)


# ---- faults, in every family ----


def nan(t):
    t[5, 2] = torch.nan


def flip(t):
    t.data.view(torch.int32)[3, 1] ^= 1


def swap(t):
    t[[8, 9]] = t[[9, 8]]


def scale(t):
    t[4] *= 8


@pytest.mark.parametrize("fault", [nan, flip, swap, scale])
def test_damaged_rows_come_back_to_the_bit_without_a_backup(any_model, fault):
    before = hash_model(any_model)
    baseline = HealthBaseline.of(any_model, TEXT, rows_per_parity=16)
    name, weight = matrix(any_model)
    with torch.no_grad():
        fault(weight)
    damaged = hash_model(any_model)
    assert damaged != before
    report = patch(any_model, baseline)
    assert report.status == "committed" and hash_model(any_model) == before
    assert [(r["where"], r["how"]) for r in report.details["repaired"]] == [(name, "parity")]
    assert report.details["unrepaired"] == []
    json.dumps(report.to_dict(), allow_nan=False)


def test_norms_and_embeddings(any_model):
    before = hash_model(any_model)
    baseline = HealthBaseline.of(any_model, TEXT)
    norm = next(p for n, p in any_model.named_parameters() if p.ndim == 1 and ("norm" in n or "ln_" in n) and n.endswith("weight"))
    with torch.no_grad():
        norm[3] *= 50
        any_model.get_input_embeddings().weight[17] *= 100
    assert kinds(any_model, baseline)[:2] == ["norm_outlier", "embedding_outlier"]
    patch(any_model, baseline)
    assert hash_model(any_model) == before
    with torch.no_grad():
        any_model.get_input_embeddings().weight[17] = 0
    assert kinds(any_model, baseline)[0] == "embedding_outlier"


def test_ties_types_and_settings_are_put_back():
    torch.manual_seed(0)
    model = FAMILIES["qwen2"]().eval()
    before, baseline = hash_model(model), HealthBaseline.of(model, TEXT)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[3] *= 2
    weight = model.model.layers[0].mlp.up_proj
    weight.weight = torch.nn.Parameter(weight.weight.detach().bfloat16())
    model.model.layers[1].self_attn.scaling *= 40
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    report = patch(model, HealthBaseline.of(FAMILIES["llama"](), None))  # another model's record: nothing may be touched
    assert report.details["repaired"] == [] and model.model.layers[1].self_attn.scaling > 1
    found = kinds(model, baseline)
    assert {"untied", "layout", "changed_weights", "changed_settings"} <= set(found)
    assert found.count("changed_settings") == 2
    report = patch(model, baseline)
    assert hash_model(model) != before  # half of the digits of the bfloat16 tensor are gone, and no backup has them
    assert report.details["unrepaired"] == [] and not baseline.differing(model)
    assert [r["how"] for r in report.details["repaired"] if r["kind"] == "layout"] == ["cast"]
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.model.layers[1].input_layernorm.variance_epsilon < 0.1


def test_a_missing_type_comes_back_from_the_backup(llama, tmp_path):
    before, baseline = hash_model(llama), HealthBaseline.of(llama, TEXT, backup=tmp_path / "b.safetensors")
    mlp = llama.model.layers[0].mlp
    mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight.detach()[:90])
    with torch.no_grad():
        mlp.down_proj.weight.zero_()
    assert kinds(llama, baseline)[:2] == ["layout", "dead_tensor"]
    report = patch(llama, baseline)
    assert report.status == "committed" and hash_model(llama) == before
    assert {r["how"] for r in report.details["repaired"]} == {"backup"}


def test_a_damaged_backup_is_not_restored(llama, tmp_path):
    baseline = HealthBaseline.of(llama, TEXT, backup=tmp_path / "b.safetensors")
    data = (tmp_path / "b.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little") + 8
    (tmp_path / "b.safetensors").write_bytes(data[:header] + bytes(len(data) - header))
    name, weight = matrix(llama)
    with torch.no_grad():
        weight[:20] *= 3
        llama.model.norm.weight[0] = 9.0
    ill = weight.detach().clone()
    report = patch(llama, baseline)
    assert [(r["where"], r["how"]) for r in report.details["repaired"]] == [("model.norm.weight", "copy")]
    assert name in {u["where"] for u in report.details["unrepaired"]} and torch.equal(weight, ill)


def test_what_runs_with_the_model(llama):
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-5)
    llama(input_ids=TEXT, labels=TEXT).loss.backward()
    optimizer.step()
    session = Session(llama)
    session.score(TEXT.flatten()[:60])
    baseline = HealthBaseline.of(llama, TEXT)
    more = {"session": session, "optimizer": optimizer}
    assert kinds(llama, baseline, **more) == []
    _name, weight = matrix(llama)
    weight.grad[0, 0] = torch.inf
    optimizer.state[weight]["exp_avg_sq"][0, 0] = -1.0
    session.cache.layers[1].values[0, 0, 3] = torch.nan
    assert kinds(llama, None, **more) == ["gradients", "optimizer_state", "bad_cache"]  # needs no baseline
    report = patch(llama, baseline, **more)
    assert len(report.details["repaired"]) == 3 and kinds(llama, baseline, **more) == []
    assert all(p.grad is None for p in llama.parameters()) and weight not in optimizer.state and session.cache_tokens == 0
    llama(input_ids=TEXT, labels=TEXT).loss.backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in llama.parameters())


@pytest.mark.parametrize("factor", [1e6, 1e-9])
def test_exploded_and_vanished_gradients(llama, factor):
    baseline = HealthBaseline.of(llama, TEXT)
    llama(input_ids=TEXT, labels=TEXT).loss.backward()
    assert kinds(llama, baseline) == []
    for p in llama.parameters():
        p.grad *= factor
    assert kinds(llama, baseline) == ["gradients"]
    for p in llama.parameters():
        p.grad.zero_()
    assert kinds(llama, baseline) == []  # what zero_grad(set_to_none=False) leaves


def test_an_oversize_cache_is_evicted_and_positions_stay(llama):
    session = Session(llama)
    session.score(TEXT.flatten()[:60])
    context = SleepContext(LMModelState("m"), llama, session)
    report = run_transaction(SecurityPatching(cache_limit_tokens=20), context)
    assert report.details["repaired"][0]["kind"] == "oversize_cache"
    assert session.cache_tokens == 20 and session.position == 60
    assert session.score(TEXT.flatten()[60:70]).isfinite().all()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_foreign_hook_is_said_and_not_repaired(llama, layer):
    baseline = HealthBaseline.of(llama, TEXT)
    llama.model.layers[layer].register_forward_hook(lambda m, a, output: output * 1e3)
    report = patch(llama, baseline)
    assert report.details["repaired"] == [] and "activations" in {u["kind"] for u in report.details["unrepaired"]}
    assert "outside" in report.details["unrepaired"][0]["reason"]


# ---- what is not repaired ----


def test_most_of_the_model_changed_is_no_damage_to_undo(llama, tmp_path):
    baseline = HealthBaseline.of(llama, TEXT, backup=tmp_path / "b.safetensors")
    with torch.no_grad():
        for p in llama.parameters():
            p += 1e-3
    trained = hash_model(llama)
    report = patch(llama, baseline)
    assert hash_model(llama) == trained and report.details["repaired"] == []
    assert any("refresh" in u["reason"] for u in report.details["unrepaired"])
    baseline.refresh(llama)
    assert kinds(llama, baseline) == []


def test_without_a_record_only_estimates(llama):
    _name, weight = matrix(llama)
    norm = llama.model.norm.weight
    with torch.no_grad():
        weight[3, 4] = torch.nan
        norm[2] = torch.inf
    assert kinds(llama) == ["nonfinite_weights"] * 2
    report = patch(llama)
    assert {r["how"] for r in report.details["repaired"]} == {"estimate"} and report.details["baseline"] is False
    assert abs(weight[3, 4].item()) < 0.01 and norm[2].item() == 1.0
    with torch.no_grad():
        weight[:50] = torch.nan
    report = patch(llama)
    assert report.details["repaired"] == [] and len(report.details["unrepaired"]) == 1
    with torch.no_grad():
        weight.zero_()
    assert kinds(llama) == ["dead_tensor"]
    llama.model.rotary_emb.inv_freq[0] = torch.nan
    report = patch(llama)
    assert [u["kind"] for u in report.details["unrepaired"]] == ["nonfinite_weights", "dead_tensor"]


def test_a_record_that_was_changed_repairs_nothing(llama, tmp_path):
    baseline = HealthBaseline.of(llama, TEXT)
    _name, _weight = matrix(llama)
    baseline.copies["model.norm.weight"][0] = 7.0
    with torch.no_grad():
        llama.model.norm.weight[0] = 3.0
    report = patch(llama, baseline)
    assert report.status == "failed" and "digest" in report.message and float(llama.model.norm.weight[0].detach()) == 3.0
    good = HealthBaseline.of(llama, TEXT)
    path = good.save(tmp_path / "h.safetensors")
    data = path.read_bytes()
    at = data.index(b"sequences") if b"sequences" in data else len(data) // 2
    path.write_bytes(data[: at + 40] + bytes([data[at + 40] ^ 1]) + data[at + 41 :])
    with pytest.raises(ValueError, match="damaged|changed|digest|archive"):
        HealthBaseline.load(path)


def test_a_baseline_must_be_of_a_healthy_model(llama, tmp_path):
    with torch.no_grad():
        llama.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"not healthy: model\.norm\.weight"):
        HealthBaseline.of(llama, TEXT, backup=tmp_path / "b.safetensors")
    assert not list(tmp_path.iterdir())
    for bad in ({"rows_per_parity": -1}, {"backup": tmp_path / "no" / "b"}, {"sequences": TEXT[0]}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            HealthBaseline.of(llama, **bad)
    with pytest.raises(ValueError, match="cache_limit_tokens"):
        SecurityPatching(cache_limit_tokens=0)


def test_time_that_is_up_is_said(llama):
    findings, skipped = examine(Patient(llama), lambda: 0.0)
    assert findings == [] and skipped == [c.kind for c in Check.registry]


# ---- healthy models ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_no_finding(any_model, dtype):
    baseline = HealthBaseline.of(any_model, TEXT)
    assert kinds(any_model, baseline) == [] and kinds(any_model) == []
    any_model.to(dtype)
    assert kinds(any_model, baseline) == []
    assert kinds(any_model.float(), baseline) == []


def test_other_architectures_are_examined_too():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    baseline = HealthBaseline.of(model, TEXT)
    assert baseline.vitals.entropy == [] and kinds(model, baseline) == [] and kinds(model) == []


# ---- the controller ----


def test_a_night_refreshes_what_it_changed_and_nothing_else(llama, tmp_path):
    before = copy.deepcopy(llama)
    baseline = HealthBaseline.of(llama, TEXT, backup=tmp_path / "b.safetensors")
    path = baseline.save(tmp_path / "h.safetensors")
    with pytest.warns(UserWarning, match="no guard set"):
        controller = AISleepController("m").bind(llama, calibration=TEXT, health=baseline)
    controller.configure_deep_sleep(strategies=["attention_head_pruning"], pruning_fraction=0.25)
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[3] *= 2  # an odd row before the night, which nobody has looked at
    assert controller.initiate_sleep(SleepTrigger.SCHEDULED) and controller.wake_up()
    assert [s.status for s in controller.last_report.strategies] == ["committed"]
    assert baseline.differing(llama) == {"model.layers.0.mlp.up_proj.weight"}
    controller.configure_deep_sleep(strategies=["security_patching"])
    assert controller.initiate_sleep(SleepTrigger.SCHEDULED) and controller.wake_up()
    assert controller.security_patches_applied == 1 == controller.get_sleep_statistics()["security_patches_applied"]
    assert torch.equal(llama.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    assert not baseline.differing(llama) and not HealthBaseline.load(path).differing(llama)
    assert all(baseline.recover(name, None) for name in baseline.tensors)  # the backup is of the pruned model


def test_light_sleep_is_not_slowed_by_hashing(llama, monkeypatch):
    controller = AISleepController("m")
    with pytest.warns(UserWarning, match="no guard set"):
        controller.bind(llama, health=HealthBaseline.of(llama, TEXT))
    monkeypatch.setattr(HealthBaseline, "differing", lambda *a: pytest.fail("hashed"))
    assert controller.initiate_sleep(SleepTrigger.MANUAL, SleepMode.LIGHT_SLEEP)


def test_nothing_is_invented_without_a_model():
    controller = AISleepController("m")
    controller.configure_deep_sleep(strategies=["security_patching"])
    assert controller.initiate_sleep(SleepTrigger.SCHEDULED)
    (report,) = controller.last_report.strategies
    assert report.status == "skipped" and report.details == {"findings": [], "repaired": [], "unrepaired": []}
    assert controller.security_patches_applied == 0


def test_a_broken_model_that_stays_broken_is_no_regression():
    inf = float("inf")
    assert StrategyReport("s", "", inf, inf).regression == 0 and StrategyReport("s", "", inf, 1.0).regression == -1
    assert StrategyReport("s", "", 1.0, inf).regression == inf
