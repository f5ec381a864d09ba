"""Clipping beside torch's own, the learning rate beside its schedulers, and nights within a real Trainer."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers import logging as transformers_logging

from ai_sleep_constructs.sleep.clipping import CLIP_MODES, clip_gradients
from ai_sleep_constructs.sleep.controller import AISleepController
from ai_sleep_constructs.sleep.modes import OptimizationStrategy, SleepMode, SleepTrigger
from ai_sleep_constructs.sleep.state import LMModelState
from ai_sleep_constructs.sleep.strategies.adaptive_learning_rate import (
    AdaptiveLearningRate,
    AdaptiveRate,
    LastStep,
    loss_trend,
    scale_rates,
)
from ai_sleep_constructs.sleep.strategies.base import SleepContext, Strategy, run_transaction
from ai_sleep_constructs.sleep.strategies.gradient_clipping import GradientClipping
from ai_sleep_constructs.sleep.moments import kept_slices, rebind_optimizer
from ai_sleep_constructs.sleep.trainer import SleepCallback

transformers_logging.set_verbosity_error()
CLIP, RATE, PRUNE = (
    OptimizationStrategy.GRADIENT_CLIPPING, OptimizationStrategy.ADAPTIVE_LEARNING_RATE, OptimizationStrategy.ATTENTION_HEAD_PRUNING,
)


def gradients(*shapes, dtypes=(torch.float32,), scale=10.0, seed=0):
    "Two equal lists of parameters with gradients."
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, shape in enumerate(shapes):
        p = nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)]))
        p.grad = (scale * torch.randn(shape, generator=generator)).to(p.dtype)
        made.append(p)
    return made, copied(made)


def copied(parameters):
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    for p, twin in zip(parameters, twins, strict=True):
        twin.grad = None if p.grad is None else p.grad.clone()
    return twins


def same(mine, theirs):
    return all(torch.equal(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))


# ---- clipping ----


@pytest.mark.parametrize("dtypes", [
    (torch.float32,), (torch.float64,), (torch.bfloat16,), (torch.float16,), (torch.float32, torch.bfloat16, torch.float64),
], ids=lambda d: "-".join(str(t).split(".")[1] for t in d))
@pytest.mark.parametrize("shapes", [((7,),), ((), (3, 5), (4, 3, 2, 2)), ((129, 67), (1000,), (0, 4), (31, 1))])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_the_global_norm_is_torchs_bit_for_bit(dtypes, shapes, max_norm):
    mine, theirs = gradients(*shapes, dtypes=dtypes)
    report = clip_gradients(mine, max_norm=max_norm)
    total = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert report.total_norm == float(total) and same(mine, theirs)
    assert report.clipped == (len(mine) if float(total) > max_norm else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_are_clipped_as_torch_clips_one_parameter(dtype):
    mine, theirs = gradients((31, 17), (5,), (2, 3, 4), dtypes=(dtype,), scale=1.0)
    norms = [float(nn.utils.clip_grad_norm_([p], 2.5)) for p in theirs]
    report = clip_gradients(mine, "layer", 2.5)
    assert list(report.norms.values()) == norms and same(mine, theirs)
    assert report.clipped == sum(n > 2.5 for n in norms) and 0 < report.clipped < 3


def agc(parameter, grad, ratio, eps, dim):
    "Brock et al. 2021, unit by unit."
    out = grad.clone()
    for unit in range(parameter.shape[dim]):
        weight = max(float(parameter.select(dim, unit).norm()), eps)
        size = float(grad.select(dim, unit).norm())
        if size > ratio * weight:
            out.select(dim, unit).mul_(ratio * weight / size)
    return out


def test_adaptive_clipping_is_unit_wise_and_knows_transposed_layers_and_the_head():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=32, n_embd=12, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False))
    model(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.mul(30).backward()
    expected = {}
    for name, p in model.named_parameters():
        if p.ndim == 2:
            transposed = "c_" in name
            expected[name] = agc(p.detach(), p.grad, 0.01, 1e-3, 1 if transposed else 0)
        else:
            limit = 0.01 * max(float(p.detach().norm()), 1e-3)
            expected[name] = p.grad * min(1.0, limit / float(p.grad.norm()))
    head = model.lm_head.weight.grad.clone()
    saved = {n: p.grad.clone() for n, p in model.named_parameters()}
    report = clip_gradients(model, "adaptive")
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-8)
    assert report.clipped >= len(expected) - 3
    for name, p in model.named_parameters():
        p.grad = saved[name].clone()
    clip_gradients(model, "adaptive", exclude_head=True)
    assert torch.equal(model.lm_head.weight.grad, head)
    assert not torch.equal(model.transformer.wte.weight.grad, saved["transformer.wte.weight"])


@pytest.mark.parametrize("mode", CLIP_MODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_named(mode, bad):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()  # there are moments now, which a step with gradients of zero would still apply
    model[1].weight.grad[0, 1] = bad
    before = copy.deepcopy(model.state_dict())
    report = clip_gradients(model, mode)
    optimizer.step()
    assert report.skipped and report.nonfinite == ("1.weight",) and report.clipped == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert report.to_dict()["largest"]["1.weight"] is None


@pytest.mark.parametrize("mode", CLIP_MODES)
def test_finite_gradients_whose_norm_overflows_are_clipped_and_not_lost(mode):
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.full((4, 4), 1e30)
    report = clip_gradients([("big", p)], mode, 1.0)
    assert not report.skipped and math.isclose(report.norms["big"], 4e30, rel_tol=1e-6)
    assert math.isclose(float(p.grad.norm()), 0.04 if mode == "adaptive" else 1.0, rel_tol=1e-4)


@pytest.mark.parametrize("bad", [
    {"mode": "unit"}, {"max_norm": 0}, {"max_norm": math.nan}, {"ratio": -1}, {"ratio": True}, {"eps": 0},
])
def test_bad_arguments_of_clipping_name_themselves_and_change_nothing(bad):
    mine, theirs = gradients((5, 5))
    with pytest.raises(ValueError, match=next(iter(bad))):
        clip_gradients(mine, **bad)
    assert same(mine, theirs)
    assert clip_gradients([nn.Parameter(torch.ones(2))]).norms == {}


def test_the_model_of_a_state_is_clipped_bit_for_bit_like_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 30), nn.Linear(30, 1))
    twin = copy.deepcopy(model)
    for net in (model, twin):
        net(torch.full((3, 50), 7.0)).sum().backward()
    norms = LMModelState("m").bind(model).clip_gradients(0.1)
    nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    assert same(model.parameters(), twin.parameters()) and min(norms.values()) > 0.1


def test_the_clipping_strategy_clips_in_a_night_and_is_undone():
    mine, theirs = gradients((6, 6), (6,))
    model = nn.Linear(6, 6)
    model.weight.grad, model.bias.grad = mine[0].grad, mine[1].grad
    context = SleepContext(LMModelState("m"), model)
    strategy = GradientClipping(gradient_clip_norm=0.5)
    saved = strategy.snapshot(context)
    report = run_transaction(strategy, context)
    assert report.status == "committed" and report.details["clipped"] == 2 and report.bits_before is None
    assert math.isclose(math.hypot(float(model.weight.grad.norm()), float(model.bias.grad.norm())), 0.5, rel_tol=1e-4)
    saved.restore()
    assert same(mine, theirs) and model.weight.grad is mine[0].grad
    for bad in ({"gradient_clip_norm": 0}, {"gradient_clip_mode": "all"}, {"gradient_clip_ratio": math.inf}, {"gradient_clip_exclude_head": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GradientClipping(**bad)


# ---- the learning rate ----


def optimizer_at(*rates):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def test_a_trend_is_not_turned_by_wild_losses_and_not_seen_in_noise():
    generator = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.randn(50, generator=generator)).tolist()
    falling = [3 - 0.01 * i + n for i, n in enumerate(noise)]
    for at in (45, 47, 49):
        falling[at] = 1e6 if at < 49 else math.nan
    assert loss_trend(falling).direction == "falling" and loss_trend([-v for v in falling[:45]]).direction == "rising"
    found = sum(loss_trend((torch.randn(30, generator=generator)).tolist()).direction != "flat" for _ in range(400))
    assert 5 <= found <= 36, f"{found} of 400 at a confidence of 95 %"
    for bad in ([1.0, 2.0, 3.0], [math.nan] * 9):
        with pytest.raises(ValueError, match="losses"):
            loss_trend(bad)


@pytest.mark.parametrize("make", [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 - t / 20),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    lambda o: torch.optim.lr_scheduler.SequentialLR(o, [
        torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)], [3]),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[0.5, 1.0], total_steps=20),
    lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
], ids=["lambda", "cosine", "sequential", "onecycle", "plateau"])
def test_a_factor_lasts_under_every_scheduler(make):
    rates = []
    for ratio in (1.0, 0.25):
        optimizer = optimizer_at(0.5, 1.0)
        scheduler = make(optimizer)
        course = []
        for step in range(12):
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
            if step == 4:
                scale_rates(optimizer, ratio, scheduler)
            course.append([g["lr"] for g in optimizer.param_groups])
        rates.append(torch.tensor(course, dtype=torch.float64))
    torch.testing.assert_close(rates[0][:4], rates[1][:4])
    torch.testing.assert_close(0.25 * rates[0][4:], rates[1][4:], rtol=1e-6, atol=1e-12)


def bowl(rate, steps=120, **options):
    "Noisy gradient descent on an ill-conditioned bowl, which is unstable above a rate of 0.2."
    generator = torch.Generator().manual_seed(1)
    curve = torch.tensor([10.0, 1.0, 0.3])
    x = nn.Parameter(torch.full((3,), 3.0))
    optimizer = torch.optim.SGD([x], lr=rate)
    adaptive = AdaptiveRate(optimizer, low=1e-3, high=1e3, **options)
    for _ in range(steps):
        loss = 0.5 * (curve * x.detach() ** 2).sum()
        x.grad = curve * x.detach() + 0.3 * torch.randn(3, generator=generator)
        adaptive.observe(float(loss))
        optimizer.step()
    return adaptive, float(loss)


def test_the_search_ends_at_the_models_rate_and_not_at_the_given_one():
    settled = []
    for rate in (0.01, 0.1, 0.4):
        adaptive, loss = bowl(rate, horizon=120)
        settled.append(adaptive.factor * rate)
        assert not adaptive.searching and loss < 1.0 and adaptive.rates[0] < 0.2 * settled[-1], "found, learned and cooled down"
    assert min(settled) > 0.01 and max(settled) < 0.2 and max(settled) < 3 * min(settled), settled


def test_the_last_step_is_forgotten_when_parameters_are_replaced_or_have_no_gradient():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    last = LastStep(optimizer)
    assert last.cosine() is None
    p.grad = torch.ones(3)
    assert last.cosine() is None and last.cosine() is None, "no step was made"
    optimizer.step()
    assert last.cosine() == pytest.approx(1.0)
    optimizer.param_groups[0]["params"][0] = q = nn.Parameter(torch.ones(2))
    q.grad = torch.ones(2)
    assert last.cosine() is None
    q.grad[0] = math.nan
    optimizer.step()
    assert last.cosine() is None


def test_following_cuts_on_a_rise_and_on_a_plateau_within_the_bounds():
    optimizer = optimizer_at(1.0, 0.1)
    adaptive = AdaptiveRate(optimizer, search=False, low=0.3, patience=3)
    generator = torch.Generator().manual_seed(0)
    for step in range(80):
        adaptive.observe(4 - 0.05 * step + 0.05 * float(torch.randn((), generator=generator)))
    assert adaptive.factor == 1.0, "a falling loss leaves the rate alone"
    for step in range(32):
        adaptive.observe(1 + 0.1 * step)
    assert adaptive.factor == 0.5
    for _ in range(100):
        adaptive.observe(2.0)
    assert adaptive.factor == 0.3 and adaptive.rates == pytest.approx([0.3, 0.03]), "never below the bound"
    saved = adaptive.state_dict()
    other = AdaptiveRate(optimizer_at(0.3, 0.03), search=False)
    other.load_state_dict(saved)
    assert other.state_dict() == saved
    assert AdaptiveRate(optimizer_at(1.0), search=False).decide([math.nan] * 9)["decision"] == "cut: the loss rises"


@pytest.mark.parametrize("bad", [
    {"low": 0}, {"low": 2}, {"high": 0.5}, {"gain": 0}, {"start": -1}, {"settle": 2.5}, {"cut": math.nan}, {"trend": 1}, {"patience": 2.5}, {"horizon": 3},
])
def test_bad_options_of_the_rate_name_themselves(bad):
    optimizer = optimizer_at(1.0)
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdaptiveRate(optimizer, **bad)
    assert optimizer.param_groups[0]["lr"] == 1.0
    with pytest.raises(ValueError, match="horizon"):
        AdaptiveRate(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), horizon=100)
    with pytest.raises(ValueError, match="learning_rate_low"):
        AdaptiveLearningRate(learning_rate_low=0)
    with pytest.raises(ValueError, match="learning_rate_window"):
        AdaptiveLearningRate(learning_rate_window=3)


def test_nights_move_the_rates_once_for_each_news_and_are_reversible():
    optimizer = optimizer_at(0.4, 0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    state = LMModelState("m")
    context = SleepContext(state, optimizer=optimizer, scheduler=scheduler)
    assert "8 are needed" in run_transaction(AdaptiveLearningRate(), context).message
    for step in range(20):
        state.record_metric("loss", 2 + 0.1 * step)
    saved = AdaptiveLearningRate().snapshot(context)
    report = run_transaction(AdaptiveLearningRate(), context)
    assert report.status == "committed" and report.details["trend"] == "rising" and scheduler.base_lrs == [0.2, 0.1]
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.1]
    assert run_transaction(AdaptiveLearningRate(), context).status == "skipped"
    saved.restore()
    assert scheduler.base_lrs == [0.4, 0.2] and [g["lr"] for g in optimizer.param_groups] == [0.4, 0.2]
    assert run_transaction(AdaptiveLearningRate(), context).details["factor"] == 0.5
    assert "no optimizer" in run_transaction(AdaptiveLearningRate(), SleepContext(state)).message


# ---- within a Trainer ----


def tiny(family="llama"):
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(
            vocab_size=64, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0))


DATA = [{"input_ids": row, "labels": row, "attention_mask": torch.ones(16, dtype=torch.long)}
        for row in torch.randint(1, 64, (48, 16), generator=torch.Generator().manual_seed(0))]


def trained(folder, callback, model=None, data=DATA, **options):
    arguments = TrainingArguments(str(folder), **{
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, **options})
    trainer = Trainer(model if model is not None else tiny(), arguments, train_dataset=data, callbacks=[callback])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no guard set
        trainer.train()
    return trainer


def calibrated(model, **deep):
    controller = AISleepController("tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        controller.bind(model, calibration=torch.stack([d["input_ids"] for d in DATA[:4]]))
    controller.configure_light_sleep(strategies=[CLIP, RATE], gradient_clip_norm=1e-3)
    controller.configure_deep_sleep(strategies=[PRUNE], pruning_fraction=0.5)
    return controller


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nights_by_schedule_with_pruning_and_a_checkpoint_after(tmp_path, family):
    model = tiny(family)
    controller = calibrated(model)
    callback = SleepCallback(controller, light_every=2, deep_every=4, day_length=16)
    seen = []
    controller.register_callback("on_optimization_complete", lambda _: seen.append((controller.optimizer, controller.day)))
    small = model.num_parameters()
    trainer = trained(tmp_path, callback, model, save_strategy="steps", save_steps=6)
    assert [(n.step, n.mode.value[:4]) for n in callback.nights] == [(2, "ligh"), (4, "ligh"), (4, "deep"), (6, "ligh"), (8, "ligh"), (8, "deep")]
    assert all(n.slept and not n.error for n in callback.nights)
    statuses = {s.strategy: s.status for n in callback.nights for s in n.report.strategies}
    assert statuses["gradient_clipping"] == "committed" and model.num_parameters() < small
    assert seen[0][0] is trainer.optimizer.optimizer and seen[0][1].shape == (8, 16)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    replaced = callback.nights[2].replaced
    assert replaced and {fate for name, fate in replaced.items() if "bias" not in name} == {"cut"}
    for p in model.parameters():
        assert trainer.optimizer.state[p]["exp_avg"].shape == p.shape
    checkpoint = tmp_path / "checkpoint-6"
    assert (checkpoint / "model.safetensors").is_file() and (checkpoint / "optimizer.pt").is_file()
    assert controller.model_state.current_mode is SleepMode.AWAKE and controller.optimizer is None
    assert not model._forward_pre_hooks and len(controller.model_state.performance_metrics["loss"]) == 8


def test_light_sleep_changes_what_the_optimizer_gets(tmp_path):
    weights = {}
    for every in (None, 1):
        model = tiny()
        trained(tmp_path, SleepCallback(calibrated(model), light_every=every), model, optim="sgd", learning_rate=1.0, max_steps=3)
        weights[every] = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = torch.cat([p.detach().flatten() for p in tiny().parameters()])
    assert (weights[1] - start).norm() <= 3.01e-3 < 0.1 < (weights[None] - start).norm()


def test_gradients_are_complete_when_light_sleep_sees_them(tmp_path):
    model, totals = tiny(), []
    controller = calibrated(model)
    callback = SleepCallback(controller, light_every=1)
    controller.register_callback("on_sleep_end", lambda: totals.append(controller.last_report.strategies[0].details["total_norm"]))
    trained(tmp_path, callback, model, gradient_accumulation_steps=3, max_steps=2, max_grad_norm=0, per_device_train_batch_size=4)
    twin, whole = tiny(), []
    trained(tmp_path, SleepCallback(watch := calibrated(twin), light_every=1), twin, max_steps=2, max_grad_norm=0, per_device_train_batch_size=12)
    whole = [r.strategies[0].details["total_norm"] for r in watch.reports]
    assert [n.step for n in callback.nights] == [1, 2] and len(totals) == 2
    assert totals[0] == pytest.approx(whole[0], rel=1e-3), "one night an optimizer step, with the gradient of all micro-batches"


def test_a_trigger_puts_to_sleep_in_its_mode(tmp_path):
    model = tiny()
    controller = calibrated(model)
    asked = iter([None, SleepTrigger.ANOMALY_DETECTED, None, SleepTrigger.DRIFT_DETECTED, None])
    controller.check_triggers = lambda: next(asked)
    callback = SleepCallback(controller)
    trained(tmp_path, callback, model, max_steps=5)
    assert [(n.step, n.mode, n.trigger) for n in callback.nights] == [
        (2, SleepMode.LIGHT_SLEEP, SleepTrigger.ANOMALY_DETECTED), (4, SleepMode.DEEP_SLEEP, SleepTrigger.DRIFT_DETECTED)]
    controller = calibrated(model := tiny())
    controller.performance_monitor.register_metric("loss", max_threshold=0.1)
    controller.set_trigger_threshold(SleepTrigger.SCHEDULED, 1e-9)
    real = SleepCallback(controller)
    trained(tmp_path, real, model, max_steps=3)
    assert len(real.nights) == 3 and {n.mode for n in real.nights} == {SleepMode.DEEP_SLEEP}, "seconds since waking, a real trigger"
    alerts = [a for a in controller.performance_monitor.alerts if a.alert_type == "threshold_violation"]
    assert len(alerts) == 1 and controller.performance_monitor.metric_samples["loss"] >= 3, "the logged losses are watched, and one breach is one alert"


class Broken(Strategy):
    name, modes = "broken_for_a_test", frozenset({SleepMode.LIGHT_SLEEP, SleepMode.DEEP_SLEEP})

    def snapshot(self, context):
        raise RuntimeError("broken on purpose")

    def apply(self, context):
        return {}


def test_a_failed_night_does_not_end_the_training(tmp_path):
    model = tiny()
    controller = calibrated(model)
    controller.light_sleep_config["strategies"] = [Broken]
    whole, finish = controller._execute_deep_sleep, []

    def breaks_off():
        finish.append(controller.model_state.current_mode)
        raise RuntimeError("the night broke off")

    controller._execute_deep_sleep = breaks_off
    callback = SleepCallback(controller, light_every=2, deep_every=3)
    trainer = trained(tmp_path, callback, model, max_steps=6)
    assert trainer.state.global_step == 6 and finish == [SleepMode.DEEP_SLEEP] * 2 and model.training
    light, deep = callback.nights[0], callback.nights[1]
    assert light.slept and light.report.strategies[0].status == "failed" and "broken on purpose" in light.report.strategies[0].message
    assert not deep.slept and "the night broke off" in deep.error and deep.report.strategies == []
    assert controller.model_state.current_mode is SleepMode.AWAKE and deep.to_dict()["error"] == deep.error
    controller.register_callback("on_sleep_start", lambda mode, trigger: 1 / 0)
    controller._execute_deep_sleep = whole
    trained(tmp_path, again := SleepCallback(controller, deep_every=1), model, max_steps=1)
    assert again.nights[0].error and again.nights[0].report is None


def test_a_batch_that_gives_nan_is_skipped_at_every_step(tmp_path):
    class Poisoned(LlamaForCausalLM):
        calls = 0

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            type(self).calls += 1
            if type(self).calls == 2:
                output.loss = output.loss * math.nan
            return output

    for mode, fine in ((None, False), ("global", True)):
        Poisoned.calls = 0
        torch.manual_seed(0)
        model = Poisoned(tiny().config)
        callback = SleepCallback(calibrated(model), clip_mode=mode)
        trained(tmp_path, callback, model, max_steps=4, max_grad_norm=0 if fine else 1.0, remove_unused_columns=False)
        assert callback.skipped_steps == (1 if fine else 0)
        assert all(bool(p.isfinite().all()) for p in model.parameters()) is fine


def test_the_day_is_bounded_and_leaves_padding_out(tmp_path):
    padded = [{**d, "attention_mask": torch.tensor([1] * 10 + [0] * 6)} for d in DATA]
    callback = SleepCallback(controller := calibrated(model := tiny()), light_every=4, day_tokens=100, day_length=8)
    trained(tmp_path, callback, model, data=padded, max_steps=8, seed=1)
    assert controller.day.shape == (12, 8) and sum(map(len, callback._recent)) < 100 + 40
    rows = {tuple(d["input_ids"][:10].tolist()) for d in DATA}
    last = torch.cat(callback._recent)[-10:]
    assert tuple(last.tolist()) in rows
    copy.deepcopy(model)


def test_replaced_parameters_keep_their_moments_only_where_that_is_certain():
    old, other = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([{"params": [old], "lr": 0.5}, {"params": [other]}], lr=0.1)
    old.grad, other.grad = torch.ones(6, 4), torch.ones(3)
    optimizer.step()
    assert kept_slices(old, old[:, [1, 3]])[0] == 1 and kept_slices(old, old[[5, 0]]) is None, "in another order"
    assert kept_slices(old, old[:4] + 1) is None and kept_slices(old, torch.zeros(2, 3)) is None
    changed = nn.Parameter(old[:3].detach() * 2)
    fresh = nn.Parameter(torch.ones(1))
    done = rebind_optimizer(optimizer, {"a": old, "b": other}, {"a": changed, "c": fresh})
    assert done == {"a": "fresh", "b": "removed", "c": "untrained"}
    assert optimizer.param_groups[0]["params"] == [changed] and optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[1]["params"] == [] and not optimizer.state
    changed.grad = torch.ones(3, 4)
    before = changed.detach().clone()
    optimizer.step()
    assert not torch.equal(changed, before)


@pytest.mark.parametrize("bad", [{"light_every": 0}, {"deep_every": 1.5}, {"day_length": 1}, {"clip_mode": "unit"}, {"night_limit": None}])
def test_bad_options_of_the_callback_name_themselves(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SleepCallback(AISleepController("m"), **bad)
    with pytest.raises(TypeError, match="controller"):
        SleepCallback("m")
