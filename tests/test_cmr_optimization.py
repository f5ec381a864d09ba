"""The optimizer of models with memories: rates that hold, batches without padding, guesses that change nothing, errors that surface."""

import copy
import queue
import subprocess
import sys
import threading
import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ai_sleep_constructs.cmr.full_model import FullCMRModel
from ai_sleep_constructs.cmr.models import IntegratedCMRModel
from ai_sleep_constructs.cmr.optimization import OPTIONS, CMRPerformanceOptimizer
from ai_sleep_constructs.cmr.optimization_background import BackgroundOptimizer, ComputationScheduler
from ai_sleep_constructs.cmr.optimization_batching import BatchProcessingOptimizer
from ai_sleep_constructs.cmr.optimization_prefetch import MemoryPrefetcher
from ai_sleep_constructs.cmr.optimization_thresholds import AdaptiveThresholdManager

MEMORY = {"target_layers": [0, 1], "relevance_threshold": 0.0, "max_states_per_layer": 100, "buffer_size": 2000, "retrieval_budget": 24}
QUIET = {"enable_adaptive_thresholds": False, "enable_background_optimization": False, "enable_prefetching": True}


def bare(kind="llama", **more):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=256, **more)).eval()
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, initializer_range=0.2, **more,
    )).eval()


def tokens(*shape, seed=0):
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(seed))


def remembering(kind="llama", made=IntegratedCMRModel, read=True, options=None, **memory):
    model = made(None, {**MEMORY, **memory}, model=bare(kind), **(options or {}))
    if read:
        with torch.no_grad():
            model(tokens(2, 60, seed=7))
    return model


def ragged(side, lengths=(5, 40, 38, 12, 41, 5, 30, 11), width=44):
    ids, mask = tokens(len(lengths), width, seed=3), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        start = {"right": 0, "left": width - length, "middle": min(2, width - length)}[side]
        mask[row, start : start + length] = 1
    return ids, mask


# --- thresholds ---

def drifting(kind, number, draw):
    "Scores of one pass at a time; `number` tokens each."
    at = 0
    while True:
        uniform = torch.rand(number, generator=draw)
        share = {"still": 0.0, "slow": min(1.0, at / 100), "jumps": float(at // 20 % 2), "narrow": 0.0}[kind]
        scores = 0.5 + uniform * 0.02 if kind == "narrow" else uniform ** (1 + 4 * share)
        yield scores
        at += 1


@pytest.mark.parametrize("kind", ["still", "slow", "jumps", "narrow"])
@pytest.mark.parametrize("number", [1, 64, 500])
@pytest.mark.parametrize("target", [0.05, 0.5])
def test_the_rate_holds_whatever_the_scores_are(kind, number, target):
    manager = AdaptiveThresholdManager(target, horizon=500)
    passes = max(150, 6000 // number)
    for scores, _ in zip(drifting(kind, number, torch.Generator().manual_seed(1)), range(passes), strict=False):
        manager.update(int((scores >= manager.threshold).sum()), number)
    stats = manager.get_threshold_stats()
    assert abs(stats["capture_rate"] - target) < 3 * 500 / (passes * number)
    assert stats["threshold_updates"] == passes and stats["offered_tokens"] == passes * number


def test_a_pass_is_not_blamed_for_what_it_may_not_store():
    manager = AdaptiveThresholdManager(0.5, horizon=100)
    for _ in range(50):
        manager.update(10, 100, most=10)
    assert manager.threshold == 0.5 and manager.get_threshold_stats()["reachable_rate"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="stored must be from 0 to tokens=10, got 11"):
        manager.update(11, 10)


def test_the_threshold_of_the_model_is_driven_and_given_back():
    model = remembering(read=False, scoring_method="variance_based", relevance_threshold=0.9)
    with torch.no_grad(), CMRPerformanceOptimizer(model, {"target_capture_rate": 0.4, "horizon": 64}) as optimizer:
        for turn in range(40):
            optimizer.optimize_forward(tokens(1, 50, seed=turn))
        stats = optimizer.get_optimization_stats()["optimization"]["thresholds"]
        assert model.engine.config.relevance_threshold != 0.9
    assert stats["offered_tokens"] == 2000 and abs(stats["capture_rate"] - 0.4) < 3 * 64 / 2000
    assert stats["capture_rate"] == pytest.approx((len(model.memory_buffer) / 2) / 2000)
    assert model.engine.config.relevance_threshold == 0.9


# --- batching ---

@pytest.mark.parametrize("seed", range(5))
def test_batches_stay_within_budget_and_padding(seed):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 400, (80,), generator=draw).tolist()
    batching = BatchProcessingOptimizer(1000, 6, 0.15)
    plan = batching.plan(lengths)
    assert sorted(i for batch in plan for i in batch) == list(range(80))
    for batch in plan:
        widest = max(lengths[i] for i in batch)
        assert len(batch) <= 6 and (widest * len(batch) <= 1000 or len(batch) == 1)
        assert 1 - sum(lengths[i] for i in batch) / (widest * len(batch)) <= 0.15
    assert [i for batch in batching.plan(lengths, by_arrival=True) for i in batch] == list(range(80))
    assert len(plan) < 50  # not simply each by itself


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left", "middle"])
@torch.no_grad()
def test_outputs_are_those_of_each_text_alone(kind, side):
    model, (ids, mask) = remembering(kind, logit_cache=50), ragged(side)
    fresh = copy.deepcopy(model.memory_buffer.snapshot()), copy.deepcopy(model.engine.cache.buffer.layers)
    output = BatchProcessingOptimizer(100, 4, 0.3).run(model, ids, mask)
    assert output.logits.shape == (*ids.shape, 96)
    for row in range(len(ids)):
        model.memory_buffer.restore(fresh[0])
        model.engine.cache.buffer.layers = copy.deepcopy(fresh[1])
        place = mask[row].nonzero()[:, 0]
        alone = model(ids[row, place][None], position_ids=place[None])
        for key in ("logits", "last_hidden_state"):
            assert torch.allclose(output[key][row, place], alone[key][0], atol=1e-4), (row, key)
            assert not output[key][row, mask[row] == 0].any()
        assert torch.allclose(output.captured_memory_states[1][row, place], alone.captured_memory_states[1][0], atol=1e-4)
        assert sum(alone.memory_info["recalled"].values())


@torch.no_grad()
def test_memories_are_those_of_one_pass_in_the_order_given():
    one, several, (ids, mask) = remembering(logit_cache=500), remembering(logit_cache=500), ragged("right")
    plain = one(ids, mask)
    output = BatchProcessingOptimizer(100, 4, 0.3).run(several, ids, mask)
    assert output.memory_info["sequence_ids"] == plain.memory_info["sequence_ids"]
    assert output.memory_info["stored"] == plain.memory_info["stored"] == 2 * int(mask.sum())
    assert output.memory_info["recalled"] == plain.memory_info["recalled"]
    assert output.memory_stats["total_entries"] == len(one.memory_buffer) == len(several.memory_buffer)
    for buffers in ((one.memory_buffer, several.memory_buffer), (one.engine.cache.buffer, several.engine.cache.buffer)):
        for layer in buffers[0].layers:
            a, b = (buffer.gather(layer, buffer.slots(layer)) for buffer in buffers)
            assert torch.equal(a.positions, b.positions) and torch.equal(a.sequences, b.sequences)
            assert torch.allclose(a.states, b.states, atol=1e-4)


@torch.no_grad()
def test_one_length_is_bit_identical():
    one, wrapped = remembering(), remembering()
    ids = tokens(4, 30, seed=1)
    with CMRPerformanceOptimizer(wrapped, QUIET) as optimizer:
        for _ in range(3):
            expected, got = one(ids), optimizer.optimize_forward(ids, torch.ones_like(ids))
            assert torch.equal(got.logits, expected.logits) and got.past_key_values is not None
            assert got.memory_info == expected.memory_info


@torch.no_grad()
def test_a_pass_that_fails_leaves_nothing():
    model, (ids, mask) = remembering(logit_cache=50), ragged("right")
    buffer, cache, before = model.engine.buffer, model.engine.cache, model.memory_buffer.version
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("third pass")

    handle = model.model.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="third pass"):
        BatchProcessingOptimizer(100, 4, 0.3).run(model, ids, mask)
    handle.remove()
    assert model.engine.buffer is buffer and model.engine.cache is cache and buffer.version == before


@torch.no_grad()
def test_padding_asks_for_no_memories():
    for side in ("left", "right"):
        model = remembering(retrieval_budget=5, target_layers=[1])  # in layer 0 equal tokens are equal states: any of them may be recalled
        fresh = model.memory_buffer.snapshot()
        ids, mask = ragged(side, lengths=(6, 44))
        model(ids, mask)
        padded = {layer: slots[0].sort().values for layer, slots in model.engine.recall.recalled.items()}
        model.memory_buffer.restore(fresh)
        place = mask[0].nonzero()[:, 0]
        model(ids[0, place][None])
        assert torch.equal(padded[1], model.engine.recall.recalled[1][0].sort().values)


@pytest.mark.parametrize(("ids", "mask", "message"), [
    (tokens(5), None, "input_ids must be of shape"),
    (tokens(2, 5), torch.ones(2, 4), "attention_mask must have the shape of input_ids"),
    (tokens(2, 5), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]), "attention_mask: row 1 has no token"),
])
def test_batches_that_are_none(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        BatchProcessingOptimizer().run(remembering(read=False), ids, mask)


# --- prefetching ---

@torch.no_grad()
def decode(model, prefetcher, ids=None, each=None):
    past, logits = None, []
    for place, token in enumerate(tokens(20, seed=11) if ids is None else ids):
        if each is not None:
            each(place, model)
        if prefetcher is not None:
            prefetcher.attach()
        output = model(token.view(1, 1), past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits)
        if prefetcher is not None:
            prefetcher.prepare()
    return torch.cat(logits)


def retrained(place, model):
    if place == 10:
        model.model.model.layers[1].self_attn.v_proj.weight.mul_(1.5)


def forgotten(place, model):
    if place == 10:
        model.memory_buffer.clear_all()
        model.memory_buffer.store_states(
            torch.randn(100, 32, generator=torch.Generator().manual_seed(5)), 1, torch.arange(100), torch.full((100,), 0.5), 900,
        )


def replaced(place, model):
    if place == 10:
        model.memory_buffer.restore(model.memory_buffer.snapshot())


@pytest.mark.parametrize("each", [None, retrained, forgotten, replaced])
@pytest.mark.parametrize("size", [{}, {"buffer_size": 60}])
def test_guesses_change_no_bit(each, size):
    model = remembering(**size)
    other = remembering(**size)
    prefetcher = MemoryPrefetcher(other)
    assert torch.equal(decode(model, None, each=each), decode(other, prefetcher, each=each))
    stats = prefetcher.get_prefetch_stats()
    assert stats["prefetch_hits"] > 0 and stats["recalled"] > stats["prefetch_hits"] and stats["prefetch_used"] > 0


def test_stale_weights_would_be_seen():
    "The change that the test above makes does change what is recalled."
    assert not torch.equal(decode(remembering(), None), decode(remembering(), None, each=retrained))


def test_the_guess_beats_random_and_its_size_is_bounded():
    rates = {}
    for guess in ("random", "successors"):
        model = remembering(retrieval_budget=6)
        prefetcher = MemoryPrefetcher(model, guess=guess, prefetch_size=20)
        decode(model, prefetcher, tokens(2, 60, seed=7)[0, :40])  # what it has read, so what comes next followed before
        rates[guess] = prefetcher.get_prefetch_stats()["hit_rate"]
        assert all(len(ready.slots) <= 20 for ready in prefetcher._ready.values())
        prefetcher.detach()
        assert model.engine.weaver.recall is model.engine.recall
    assert rates["successors"] > 1.5 * rates["random"]


def test_a_right_guess_is_used_and_a_wrong_value_would_show():
    model, other = remembering(), remembering()
    prefetcher = MemoryPrefetcher(other)

    def spoil(place, model):
        if place == 15:
            for ready in prefetcher._ready.values():
                ready.values.mul_(3)

    assert not torch.equal(decode(model, None), decode(other, prefetcher, each=spoil))


def test_where_rounding_differs_nothing_ready_is_used(monkeypatch):
    model, other = remembering(), remembering()
    prefetcher = MemoryPrefetcher(other)
    from ai_sleep_constructs.cmr import optimization_prefetch

    build = optimization_prefetch.build
    monkeypatch.setattr(optimization_prefetch, "build", lambda layer, states: tuple(x * (1 + 1e-6) for x in build(layer, states)))
    assert torch.equal(decode(model, None), decode(other, prefetcher))
    stats = prefetcher.get_prefetch_stats()
    assert stats["prefetch_used"] == 0 and stats["inexact_shapes"] > 0


def test_hooks_that_come_back_are_served_again():
    model = remembering()
    with torch.no_grad(), CMRPerformanceOptimizer(model, QUIET) as optimizer:
        optimizer.optimize_forward(tokens(1, 20))
        model.remove_memory_hooks()
        stored = len(model.memory_buffer)
        off = optimizer.optimize_forward(tokens(1, 20))
        assert len(model.memory_buffer) == stored and off.memory_info["stored"] == 0
        model.register_memory_hooks()
        before = optimizer.memory_prefetcher.get_prefetch_stats()["recalled"]
        optimizer.optimize_forward(tokens(1, 20))
        assert optimizer.memory_prefetcher.get_prefetch_stats()["recalled"] > before


# --- scheduling ---

def test_priorities_and_a_bounded_queue():
    order, go = [], threading.Event()
    with ComputationScheduler(3) as scheduler:
        scheduler.submit(go.wait)
        while scheduler.get_scheduler_stats()["jobs_waiting"]:
            time.sleep(0.001)
        assert scheduler.submit(lambda: order.append("low"), priority=-1, name="low")
        assert not scheduler.submit(lambda: order.append("low again"), name="low")
        assert scheduler.submit(lambda: order.append("usual")) and scheduler.submit(lambda: order.append("high"), priority=9)
        with pytest.raises(queue.Full, match="max_queue=3 jobs wait already"):
            scheduler.submit(print)
        with pytest.raises(TimeoutError):
            scheduler.wait(0.01)
        go.set()
        scheduler.wait()
    assert order == ["high", "usual", "low"]
    assert scheduler.get_scheduler_stats()["jobs_done"] == scheduler.get_scheduler_stats()["jobs_submitted"] == 4


@pytest.mark.parametrize("call", ["wait", "submit", "close", "exit"])
def test_errors_surface_once_and_the_thread_lives(call):
    scheduler, ran = ComputationScheduler(), []
    go = threading.Event()
    scheduler.submit(go.wait)
    scheduler.submit(lambda: {}["missing"], name="first")
    scheduler.submit(lambda: 1 / 0, name="second")
    go.set()
    if call == "submit":
        while scheduler.get_scheduler_stats()["jobs_done"] < 3:
            time.sleep(0.001)
    calls = {"wait": scheduler.wait, "submit": lambda: scheduler.submit(print), "close": scheduler.close, "exit": lambda: scheduler.__exit__(None, None, None)}
    with pytest.raises(RuntimeError, match="background job 'first' failed: KeyError: 'missing'") as caught:
        calls[call]()
    assert isinstance(caught.value.__cause__, KeyError) and "so did 'second': ZeroDivisionError" in caught.value.__notes__[0]
    if call in ("wait", "submit"):
        scheduler.submit(lambda: ran.append(1))
        scheduler.wait()
        assert ran == [1]
    scheduler.close()
    scheduler.close()
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit(print)


def test_an_error_of_the_body_is_not_hidden():
    with pytest.raises(ZeroDivisionError) as caught, ComputationScheduler() as scheduler:
        scheduler.submit(lambda: {}["missing"])
        raise ZeroDivisionError("the body's own")
    assert "KeyError" in caught.value.__notes__[0]


def test_jobs_must_not_wait_for_themselves():
    with ComputationScheduler() as scheduler:
        for method in (scheduler.wait, scheduler.close):
            scheduler.submit(method)
            with pytest.raises(RuntimeError, match="a background job must not"):
                scheduler.wait()


def test_no_thread_before_the_first_job_and_none_after_the_last_reference():
    before = threading.active_count()
    scheduler = ComputationScheduler()
    assert threading.active_count() == before
    scheduler.submit(lambda: None)
    scheduler.wait()
    thread = scheduler._work.thread
    assert thread.is_alive()
    del scheduler
    thread.join(5)
    assert not thread.is_alive()


def test_python_ends_with_a_scheduler_open_and_tells_of_its_errors():
    child = """if True:
        import threading, time
        from ai_sleep_constructs.cmr.optimization_background import ComputationScheduler
        assert threading.active_count() == 1
        scheduler = ComputationScheduler()
        submitted = threading.Event()
        scheduler.submit(submitted.wait)  # nothing has failed yet when the others are submitted
        scheduler.submit(lambda: {}["nobody asked"], name="lost")
        scheduler.submit(lambda: time.sleep(2))
        scheduler.submit(lambda: time.sleep(100))
        submitted.set()
        time.sleep(0.5)
        print("end")"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "end\n" and "background job 'lost' failed" in done.stderr and "KeyError: 'nobody asked'" in done.stderr


@torch.no_grad()
def test_a_pass_sees_no_job_in_between():
    model, seen = remembering(), []
    optimizer = CMRPerformanceOptimizer(model, QUIET)
    running = [False]

    def job():
        running[0] = True
        time.sleep(0.02)
        running[0] = False

    def inside(module, args):
        optimizer.computation_scheduler.submit(job)
        time.sleep(0.05)
        seen.append(running[0])

    handle = model.model.register_forward_pre_hook(inside)
    optimizer.optimize_forward(tokens(1, 10))
    handle.remove()
    assert seen == [False]
    optimizer.close()
    assert optimizer.get_optimization_stats()["optimization"]["scheduler"]["jobs_done"] == 2  # the job and a prefetch


# --- upkeep, and everything together ---

@torch.no_grad()
def test_upkeep_merges_and_prunes():
    model = remembering(made=FullCMRModel, read=False, options={"retrieval_strategy": "semantic_similarity", "retrieval_config": {"similarity_threshold": -1.0}},
                        buffer_size=120, retrieval_budget=10)
    with CMRPerformanceOptimizer(model, {"every": 2, "consolidate_at": 0.9, "consolidate_to": 0.5, "enable_adaptive_thresholds": False}) as optimizer:
        for _ in range(4):
            output = optimizer.optimize_forward(tokens(1, 30))
        optimizer.wait()
        stats = optimizer.get_optimization_stats()["optimization"]["background"]
    assert len(model.memory_buffer) == 60 and stats["consolidations"] >= 1 and stats["merged"] > 0
    assert stats["pruned_answers"] > 0 and not len(model.retriever.cache)
    assert output.performance_stats["strategy_usage"]["semantic_similarity"] > 0


@torch.no_grad()
def test_by_default_nothing_is_lost_below_the_budget_and_nothing_different_at_it():
    model, plain = remembering(read=False, buffer_size=200), remembering(read=False, buffer_size=200)
    with CMRPerformanceOptimizer(model, {"every": 1, "enable_adaptive_thresholds": False}) as optimizer:
        for turn in range(20):
            text = tokens(1, 7, seed=turn % 10)
            optimizer.optimize_forward(text)
            plain(text)
            optimizer.wait()
            if len(plain.memory_buffer) < 200:
                assert len(model.memory_buffer) == len(plain.memory_buffer)
        stats = optimizer.get_optimization_stats()["optimization"]["background"]
    assert len(plain.memory_buffer) == 200 and stats["merged"] > 0 == stats["dropped"]
    model = remembering(read=False, buffer_size=60)
    with CMRPerformanceOptimizer(model, {"every": 1, "enable_adaptive_thresholds": False}) as optimizer:
        optimizer.optimize_forward(torch.arange(1, 61)[None])  # no two of them alike
        optimizer.wait()
        assert len(model.memory_buffer) == 60 and optimizer.get_optimization_stats()["optimization"]["background"]["consolidations"] == 1


@torch.no_grad()
def test_what_a_run_gives_does_not_depend_on_the_speed_of_the_thread():
    def run(slow):
        model = remembering(read=False, buffer_size=100)
        with CMRPerformanceOptimizer(model, {"every": 1, "consolidate_at": 0.6, "consolidate_to": 0.5, "enable_prefetching": True}) as optimizer:
            logits = []
            for turn in range(6):
                if slow:
                    optimizer.computation_scheduler.submit(lambda: time.sleep(0.05), priority=99)
                logits.append(optimizer.optimize_forward(tokens(2, 30, seed=turn)).logits)
            assert optimizer.get_optimization_stats()["optimization"]["background"]["consolidations"] > 0
        return torch.stack(logits)

    assert torch.equal(run(False), run(True))


@torch.no_grad()
def test_errors_of_the_background_reach_the_next_forward():
    model = remembering()
    optimizer = CMRPerformanceOptimizer(model, {"every": 1, "enable_prefetching": True})
    optimizer.background_optimizer.consolidate = lambda: (_ for _ in ()).throw(OSError("no room"))
    optimizer.optimize_forward(tokens(1, 10))
    with pytest.raises(RuntimeError, match=r"background job 'consolidate' failed: OSError: no room"):
        optimizer.optimize_forward(tokens(1, 10))
    optimizer.optimize_forward(tokens(1, 10))
    with pytest.raises(RuntimeError, match="no room"):
        optimizer.close()
    optimizer.close()
    assert model.engine.weaver.recall is model.engine.recall
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.optimize_forward(tokens(1, 10))


@torch.no_grad()
def test_statistics_count_what_happened():
    model, (ids, mask) = remembering(), ragged("left")
    with CMRPerformanceOptimizer(model, {"token_budget": 100, "max_padding": 0.3}) as optimizer:
        output = optimizer.optimize_forward(ids, mask)
        stats = output.performance_stats
        passes = stats["optimization"]["batching"]["batches"]
        assert stats["forward_passes"] == passes + 1  # one before the optimizer came
        assert stats["optimized_tokens"] == stats["optimization"]["batching"]["tokens"] == int(mask.sum())
        assert stats["optimized_forwards"] == 1 and stats["optimized_seconds"] > 0
        assert stats["tokens_per_second"] == stats["optimized_tokens"] / stats["optimized_seconds"]
        assert 0 < stats["optimization"]["batching"]["padding_share"] < stats["optimization"]["batching"]["padding_share_by_arrival"]
        hidden = optimizer.optimize_forward(ids, mask, output_hidden_states=True)  # further arguments: as it is
        assert len(hidden.hidden_states) == 3
        assert optimizer.get_optimization_stats()["optimization"]["batching"]["batches"] == passes


BAD = {
    "enable_prefetching": [1, None], "target_capture_rate": [0, 1.1, "0.3", True], "horizon": [0, 1.5], "token_budget": [0, 10.0], "max_batch_size": [0, True],
    "max_padding": [-0.1, 1, None], "prefetch_size": [0], "successors": [-1, 1.0], "max_queue": [0], "every": [0, None],
    "consolidate_at": [0, 1.5, "all"], "consolidate_to": [0, 1.1, None, (0.95, 0.99)], "drop": [None, 1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_values_name_themselves(name, value):
    model = remembering(read=False)
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        CMRPerformanceOptimizer(model, {"consolidate_at": value[0], name: value[1]} if isinstance(value, tuple) else {name: value})
    assert model.engine.weaver.recall is model.engine.recall and name in OPTIONS


def test_unknown_keys_name_the_closest():
    with pytest.raises(ValueError, match="optimization_config has no key 'enable_prefetchin'; did you mean enable_prefetching?"):
        CMRPerformanceOptimizer(remembering(read=False), {"enable_prefetchin": True})
    with pytest.raises(ValueError, match="guess must be one of successors, last, random, got 'psychic'"):
        MemoryPrefetcher(remembering(read=False), guess="psychic")
    with ComputationScheduler() as scheduler, pytest.raises(ValueError, match="every must be"):
        BackgroundOptimizer(remembering(read=False), scheduler, every=0)
