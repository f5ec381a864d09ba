"""What the literate tests of the sleep notebooks cannot say: families, faults, no-ops, hashes, and the seeds' examples."""

import copy
import json
import logging
import threading
import warnings

import pytest
import torch
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM, StaticCache

from ai_sleep_constructs import (
    AISleepController,
    HuggingFaceModelAdapter,
    OptimizationStrategy,
    SleepMode,
    SleepTrigger,
    configure_optimal_sleep_schedule,
    create_sleep_enabled_model,
    load_corpus,
    load_model,
)
from ai_sleep_constructs.reference.architecture import attention_blocks, norm_parameters
from ai_sleep_constructs.sleep.guard import GuardSet, sample_sequences
from ai_sleep_constructs.sleep.hashing import hash_model
from ai_sleep_constructs.sleep.report import read_journal
from ai_sleep_constructs.sleep.session import Session
from ai_sleep_constructs.sleep.state import LMModelState
from ai_sleep_constructs.sleep.strategies.base import SleepContext, Strategy, run_transaction
from ai_sleep_constructs.sleep.strategies.head_pruning import (
    AttentionHeadPruning,
    choose_groups,
    gated,
    head_importance,
    prune_groups,
)
from ai_sleep_constructs.sleep.strategies.kv_cache import POLICIES, KVCacheManagement, evict
from ai_sleep_constructs.sleep.strategies.layer_norm import LayerNormRecalibration
from families import FAMILIES


@pytest.fixture(params=FAMILIES)
def tiny(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


@pytest.fixture(scope="module")
def reference():
    return load_model("reference")


@pytest.fixture(scope="module")
def material(reference):
    _, tokenizer = reference
    guard = GuardSet.of_texts(tokenizer, load_corpus("python", "guard", max_bytes=40_000).texts, sequences=4)
    calibration = sample_sequences(tokenizer, load_corpus("python", "train", max_bytes=80_000).texts, 6, 256)
    return guard, calibration


@pytest.fixture
def night(reference, material):
    "A context with a fresh copy of the reference model that has served 400 tokens."
    model = copy.deepcopy(reference.model)
    guard, calibration = material
    session = Session(model)
    session.score(calibration.flatten()[:400])
    return SleepContext(LMModelState("reference"), model, session, guard, calibration)


# ---- every family ----


def test_pruning_equals_closed_gates(tiny):
    ids = torch.arange(40).view(2, 20)
    blocks = attention_blocks(tiny)
    chosen = {0: [1], 2: [0]}
    gates = [torch.ones(1, b.groups) for b in blocks]
    for layer, groups in chosen.items():
        gates[layer][0, groups] = 0
    with torch.no_grad(), gated(blocks, gates):
        closed = tiny(ids).logits
    before = tiny.num_parameters()
    for layer, groups in chosen.items():
        prune_groups(blocks[layer], groups)
    with torch.no_grad():
        cut = tiny(ids).logits
    assert torch.allclose(closed, cut, atol=1e-5)
    assert tiny.num_parameters() < before


def test_eviction_with_true_positions_equals_a_mask(tiny):
    ids = torch.randint(1, 128, (60,), generator=torch.Generator().manual_seed(1))
    full, short = Session(tiny), Session(tiny)
    full.score(ids[:40])
    short.score(ids[:40])
    evict(short.cache, 12, "recency", sinks=4, recent=0.5)
    assert short.cache_tokens == 12 and short.position == 40
    kept = torch.zeros(1, 60, dtype=torch.long)
    kept[:, [*range(4), *range(32, 60)]] = 1
    with torch.no_grad():
        masked = tiny(ids[None, 40:], past_key_values=full.cache, attention_mask=kept, position_ids=torch.arange(40, 60)[None])
    nll = torch.nn.functional.cross_entropy(masked.logits[0, :-1], ids[41:], reduction="none")
    assert (short.score(ids[40:])[1:] - nll).abs().max() < 1e-4


def test_rolled_back_pruning_leaves_every_family_as_it_was(tiny):
    class Tokenizer:
        eos_token_id = 0

        def batch_decode(self, ids, skip_special_tokens):
            return ["x" * len(row) for row in ids]

    ids = torch.randint(1, 128, (4, 32), generator=torch.Generator().manual_seed(2))
    session = Session(tiny)
    session.score(ids[0])
    caches = [layer.keys for layer in session.cache.layers]
    context = SleepContext(LMModelState("tiny"), tiny, session, GuardSet(Tokenizer(), ids), ids)
    before, names = hash_model(tiny), [n for n, _ in tiny.named_parameters()]

    class Refused(AttentionHeadPruning):
        def guard_bits(self, context, *, applied):
            return 2.0 if applied else 1.0

    report = run_transaction(Refused(pruning_fraction=0.4), context)
    assert report.status == "rolled_back" and report.details["parameters_after"] < report.details["parameters_before"]
    assert hash_model(tiny) == before and [n for n, _ in tiny.named_parameters()] == names
    assert all(layer.keys is keys for layer, keys in zip(session.cache.layers, caches, strict=True))
    session.score(ids[1])


def test_importance_ranks_a_dead_group_last(tiny):
    block = attention_blocks(tiny)[1]
    width = block.head_dim * block.heads_per_group
    with torch.no_grad():
        weight = block.out.weight
        (weight[:width] if block.fused else weight[:, :width]).zero_()
    ids = torch.randint(1, 128, (4, 32), generator=torch.Generator().manual_seed(3))
    importance = head_importance(tiny, ids)
    assert importance[1][0] == 0 and sum(int((v == 0).sum()) for v in importance) == 1
    assert choose_groups(importance, threshold=0.0) == {1: [0]}
    assert all(p.grad is None for p in tiny.parameters())


# ---- a strategy replaced by a no-op turns these red ----


def test_kv_cache_management_shortens_the_cache(night):
    report = run_transaction(KVCacheManagement(kv_cache_retention=0.25, max_regression=0.5), night)
    assert report.status == "committed"
    assert night.session.cache_tokens == 100 and night.session.position == 400
    assert night.session.cache_bytes * 4 == report.details["bytes_before"]
    assert report.bits_after != report.bits_before


def test_head_pruning_removes_weights_and_beats_random(night):
    dense = night.guard.bits_per_byte(night.model)
    importance = head_importance(night.model, night.calibration)
    random_costs = []
    for seed in range(4):
        model = copy.deepcopy(night.model)
        scores = [torch.rand(len(v), generator=torch.Generator().manual_seed(seed * 100 + i)) for i, v in enumerate(importance)]
        for layer, groups in choose_groups(scores, fraction=0.25).items():
            prune_groups(attention_blocks(model)[layer], groups)
        random_costs.append(night.guard.bits_per_byte(model) - dense)
    before = night.model.num_parameters()
    report = run_transaction(AttentionHeadPruning(pruning_fraction=0.25, max_regression=1.0), night)
    assert report.status == "committed" and night.model.num_parameters() < before
    assert report.details["groups_after"] == 18
    assert 0 < report.bits_after - report.bits_before < sum(random_costs) / len(random_costs)
    recorded = sum(len(v["pruned"]) for v in night.state.attention_heads.values())
    assert recorded == 2 * 6


def test_layer_norm_recalibration_recovers_part_of_what_pruning_cost(night):
    recalibration = LayerNormRecalibration()
    recalibration.before_night(night)
    pruning = run_transaction(AttentionHeadPruning(pruning_fraction=0.35, max_regression=10.0), night)
    others = {n: p.detach().clone() for n, p in night.model.named_parameters() if n not in norm_parameters(night.model)}
    repair = run_transaction(recalibration, night)
    assert repair.status == "committed"
    assert pruning.bits_after - repair.bits_after > 0.1 * (pruning.bits_after - pruning.bits_before) > 0
    assert repair.details["loss_after"] < repair.details["loss_before"]
    now = dict(night.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in others.items())


def test_recalibration_to_the_day_adapts_to_its_text(reference):
    model, tokenizer = copy.deepcopy(reference.model), reference.tokenizer
    headers = sample_sequences(tokenizer, load_corpus("cpp", "test", max_bytes=200_000).texts, 16, 256)
    session = Session(model)
    for row in headers[:8]:
        session.reset()
        session.score(row)
    elsewhere = GuardSet(tokenizer, headers[8:])
    before = elsewhere.bits_per_byte(model)
    context = SleepContext(LMModelState("reference"), model, session)
    report = run_transaction(LayerNormRecalibration(recalibration_objective="text"), context)
    assert report.status == "committed" and elsewhere.bits_per_byte(model) < before


# ---- transactions ----


@pytest.mark.parametrize(
    "strategy",
    [
        AttentionHeadPruning(pruning_fraction=0.5, max_regression=0.0),
        LayerNormRecalibration(recalibration_objective="text", recalibration_rate=0.1, max_regression=0.0),
        KVCacheManagement(kv_cache_retention=2, max_regression=0.0),
    ],
    ids=lambda s: s.label(),
)
def test_after_a_rollback_the_weights_are_bit_identical(night, strategy):
    before, tokens = hash_model(night.model), night.session.cache_tokens
    optimizer = torch.optim.SGD(night.model.parameters(), lr=0.1)
    report = run_transaction(strategy, night)
    assert report.status == "rolled_back", report
    assert hash_model(night.model) == before and night.session.cache_tokens == tokens
    assert {id(p) for p in night.model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    assert not night.state.attention_heads and not night.state.layer_norms


def test_an_interrupt_is_undone_and_raised(night):
    class Interrupted(LayerNormRecalibration):
        def apply(self, context):
            with torch.no_grad():
                for p in norm_parameters(context.model).values():
                    p.mul_(2)
            raise KeyboardInterrupt

    before = hash_model(night.model)
    with pytest.raises(KeyboardInterrupt):
        run_transaction(Interrupted(), night)
    assert hash_model(night.model) == before


def test_a_model_that_becomes_nan_is_rolled_back(night):
    class Poison(LayerNormRecalibration):
        def apply(self, context):
            with torch.no_grad():
                next(iter(norm_parameters(context.model).values())).fill_(float("nan"))
            return {}

    before = hash_model(night.model)
    night.memo.clear()
    report = run_transaction(Poison(max_regression=1e9), night)
    assert report.status == "rolled_back" and hash_model(night.model) == before


def test_a_model_of_unknown_layout_is_skipped_and_the_night_goes_on(material):
    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    guard, calibration = material
    controller = AISleepController("neox").bind(model, guard=guard, calibration=calibration)
    assert controller.initiate_sleep(SleepTrigger.SCHEDULED) and controller.wake_up()
    done = {s.strategy: s for s in controller.last_report.strategies}
    pruning, recalibration = done["attention_head_pruning"], done["layer_norm_recalibration"]
    assert pruning.status == "skipped" and "no attention module" in pruning.message
    assert recalibration.status == "committed"


def test_errors_outside_apply_are_failures_and_not_raised(night):
    class NoSnapshot(LayerNormRecalibration):
        def snapshot(self, context):
            raise MemoryError("too large")

    class NoNight(LayerNormRecalibration):
        name = "no_night"

        def before_night(self, context):
            raise MemoryError("too large")

    assert run_transaction(NoSnapshot(), night).status == "failed"
    controller = AISleepController("m").bind(night.model, guard=night.guard, calibration=night.calibration)
    controller.deep_sleep_config["strategies"] = [NoNight]
    assert controller.initiate_sleep(SleepTrigger.SCHEDULED)
    assert controller.last_report.strategies[0].status == "failed" and "too large" in controller.last_report.strategies[0].message


def test_quantised_heads_are_left_alone(material):
    pytest.importorskip("bitsandbytes")
    model, _ = load_model("reference", quantization="8bit", device="cpu")
    guard, calibration = material
    report = run_transaction(AttentionHeadPruning(), SleepContext(LMModelState("8bit"), model, None, guard, calibration))
    assert report.status == "skipped" and "before quantising" in report.message


def test_an_interrupted_score_leaves_the_conversation_as_it_was(reference):
    model = copy.deepcopy(reference.model)
    session, twin = Session(model), Session(model)
    session.score(torch.arange(30))
    twin.score(torch.arange(30))

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = attention_blocks(model)[3].module.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.score(torch.arange(20))
    handle.remove()
    assert torch.equal(session.score(torch.arange(40, 60)), twin.score(torch.arange(40, 60)))


@pytest.mark.parametrize("ids", [[1.5, 2.0], [[1, 2], [3, 4]], [-1], [4096]], ids=str)
def test_bad_tokens_are_refused(reference, ids):
    with pytest.raises(ValueError, match="input_ids"):
        Session(reference.model).score(torch.tensor(ids))


def test_rebinding_keeps_the_session_of_the_same_model(reference, material):
    guard, calibration = material
    adapter = HuggingFaceModelAdapter(copy.deepcopy(reference.model), "m", guard=guard, calibration=calibration)
    adapter.serve(torch.arange(50))
    adapter.controller.bind(adapter.model, guard=guard, calibration=calibration)
    adapter.controller.configure_deep_sleep(
        strategies=["attention_head_pruning"], pruning_fraction=0.25, max_regression=5.0
    )
    adapter.enable_sleep_cycles()
    assert adapter.initiate_deep_sleep() and adapter.wake_model()
    assert adapter.controller.last_report.strategies[0].details["pruned"]
    adapter.serve(torch.arange(50))
    assert adapter.controller.deep_sleep_config["duration"] == 1800


def test_a_journal_that_cannot_be_written_does_not_keep_the_model_asleep(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    controller = AISleepController("m", journal=tmp_path / "file" / "nights.jsonl")
    with caplog.at_level(logging.ERROR):
        assert controller.initiate_sleep(SleepTrigger.MANUAL) and controller.wake_up()
    assert "journal" in caplog.text


def test_static_cache_is_refused_before_anything_changes(reference):
    cache = StaticCache(config=reference.model.config, max_cache_len=32)
    with torch.no_grad():
        reference.model(torch.arange(8)[None], past_key_values=cache, use_cache=True)
    with pytest.raises(TypeError, match="StaticLayer"):
        evict(cache, 4)


def test_empty_cache_and_every_policy(reference):
    assert evict(DynamicCache(), 0.5)["tokens_after"] == 0
    for policy in POLICIES:
        session = Session(reference.model)
        session.score(torch.arange(50))
        evict(session.cache, 0.5, policy)
        assert {layer.keys.shape[2] for layer in session.cache.layers} == {25}


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (KVCacheManagement, {"kv_cache_retention": 0.0}),
        (KVCacheManagement, {"kv_cache_retention": True}),
        (KVCacheManagement, {"kv_cache_retention": 1.01}),
        (KVCacheManagement, {"kv_cache_policy": "oldest"}),
        (KVCacheManagement, {"kv_cache_sinks": -1}),
        (AttentionHeadPruning, {"pruning_threshold": 1.0}),
        (AttentionHeadPruning, {"pruning_fraction": -0.1}),
        (AttentionHeadPruning, {"max_regression": -1}),
        (AttentionHeadPruning, {"max_regression": float("inf")}),
        (LayerNormRecalibration, {"recalibration_objective": "both"}),
        (LayerNormRecalibration, {"recalibration_steps": 0}),
        (LayerNormRecalibration, {"recalibration_rate": 0.0}),
    ],
)
def test_bad_options_name_themselves(strategy: type[Strategy], options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        strategy(**options)


# ---- the controller ----


def test_seed_examples_run(tmp_path):
    controller = AISleepController(model_id="gpt-neo-125M", enable_monitoring=True, auto_adapt=True)
    controller.configure_light_sleep(duration=300)
    controller.configure_deep_sleep(duration=1800)
    controller.configure_light_sleep(
        duration=300,
        strategies=[OptimizationStrategy.GRADIENT_CLIPPING, OptimizationStrategy.KV_CACHE_MANAGEMENT],
        gradient_clip_norm=1.0,
        kv_cache_retention=0.8,
    )
    assert controller.initiate_sleep(trigger=SleepTrigger.MANUAL, mode=SleepMode.LIGHT_SLEEP)
    assert controller.wake_up()
    assert [s.status for s in controller.last_report.strategies] == ["skipped", "skipped"]
    assert set(controller.get_sleep_statistics()) == {
        "model_id", "total_sleep_cycles", "current_mode", "total_light_sleep_time", "total_deep_sleep_time",
        "total_awake_time", "sleep_ratio", "last_sleep", "learning_rate", "security_patches_applied",
    }
    adapter = create_sleep_enabled_model("gpt2", enable_monitoring=True, auto_adapt=True, load_model=False)
    configure_optimal_sleep_schedule(adapter, workload_type="continuous")
    adapter.enable_sleep_cycles()
    assert adapter.initiate_light_sleep(duration=300)
    adapter.track_inference_metrics(perplexity=3.5, loss=0.42, inference_time=0.1)
    assert adapter.wake_model()
    assert {"model_id", "sleep_enabled", "current_mode", "sleep_statistics", "monitoring"} <= set(adapter.get_model_status())
    with pytest.raises(ValueError, match="interactive"):
        configure_optimal_sleep_schedule(adapter, "nightly")


def test_modes_follow_triggers():
    for trigger in SleepTrigger:
        controller = AISleepController("m")
        assert controller.initiate_sleep(trigger)
        deep = trigger in (SleepTrigger.DRIFT_DETECTED, SleepTrigger.SCHEDULED)
        assert controller.model_state.current_mode is (SleepMode.DEEP_SLEEP if deep else SleepMode.LIGHT_SLEEP)


def test_interrupt_wakes_the_model_and_keeps_the_journal(tmp_path):
    class Interrupted(AISleepController):
        def _execute_light_sleep(self):
            raise KeyboardInterrupt

    controller = Interrupted("m", journal=tmp_path / "a" / "nights.jsonl")
    with pytest.raises(KeyboardInterrupt):
        controller.initiate_sleep(SleepTrigger.MANUAL)
    assert controller.model_state.current_mode is SleepMode.AWAKE
    assert read_journal(tmp_path / "a" / "nights.jsonl")[0]["cycle"] == 1


def test_callbacks_that_raise(caplog):
    controller = AISleepController("m")
    controller.configure_light_sleep(strategies=[OptimizationStrategy.KV_CACHE_MANAGEMENT])
    heard = []
    controller.register_callback("on_optimization_complete", lambda s: 1 / 0)
    controller.register_callback("on_optimization_complete", heard.append)
    controller.register_callback("on_sleep_end", lambda: 1 / 0)
    with caplog.at_level(logging.ERROR):
        assert controller.initiate_sleep(SleepTrigger.MANUAL) and controller.wake_up()
    assert heard == ["kv_cache_management"] and len(caplog.records) == 2


def test_unknown_keyword_is_kept_and_warned_about():
    controller = AISleepController("m")
    with pytest.warns(UserWarning, match="kv_cache_retention"):
        controller.configure_light_sleep(kv_cache_retentoin=0.5)
    assert controller.light_sleep_config["kv_cache_retentoin"] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.configure_light_sleep(kv_cache_retention=0.5)


def test_one_sleep_at_a_time():
    controller = AISleepController("m")
    results = []
    threads = [threading.Thread(target=lambda: results.append(controller.initiate_sleep(SleepTrigger.MANUAL))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(results) == [False] * 7 + [True] and controller.total_sleep_cycles == 1


def test_duration_is_a_budget(reference, material):
    guard, calibration = material
    controller = AISleepController("reference").bind(copy.deepcopy(reference.model), guard=guard, calibration=calibration)
    controller.configure_deep_sleep(duration=2, pruning_fraction=0.1, recalibration_steps=100_000, max_regression=10.0)
    controller.initiate_sleep(SleepTrigger.SCHEDULED)
    report = controller.last_report
    done = [s for s in report.strategies if s.strategy == "layer_norm_recalibration"]
    assert done[0].status == "skipped" or done[0].details["steps"] < 1_000
    assert report.seconds < 60


def test_without_guard_a_warning(reference):
    with pytest.warns(UserWarning, match="guard"):
        AISleepController("m").bind(reference.model)


def test_adapter_disabled_warns_once(caplog):
    adapter = HuggingFaceModelAdapter(None, "m")
    with caplog.at_level(logging.WARNING):
        assert not adapter.initiate_light_sleep() and not adapter.initiate_deep_sleep()
    assert len(caplog.records) == 1
    with pytest.raises(RuntimeError, match="no model"):
        adapter.serve("x")


def test_report_is_json(night):
    controller = AISleepController("reference").bind(
        night.model, session=night.session, guard=night.guard, calibration=night.calibration
    )
    controller.configure_light_sleep(strategies=[OptimizationStrategy.KV_CACHE_MANAGEMENT], kv_cache_retention=0.5)
    controller.initiate_sleep(SleepTrigger.MANUAL)
    record = json.loads(json.dumps(controller.last_report.to_dict()))
    evicted = {s["strategy"]: s for s in record["strategies"]}["kv_cache_management"]
    assert evicted["status"] == "committed" and evicted["details"]["bytes_after"] < evicted["details"]["bytes_before"]
