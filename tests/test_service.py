"""The online service, the coordinator and the adapter's generate: under threads, through nights, and through faults."""

import asyncio
import copy
import gc
import logging
import signal
import threading
import time
import warnings
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from ai_sleep_constructs.sleep.adapter import HuggingFaceModelAdapter, complete
from ai_sleep_constructs.sleep.answering import QueueFull, ServiceClosed
from ai_sleep_constructs.sleep.controller import AISleepController
from ai_sleep_constructs.sleep.coordinator import SleepCoordinator
from ai_sleep_constructs.sleep.guard import GuardSet
from ai_sleep_constructs.sleep.hashing import hash_model
from ai_sleep_constructs.sleep.modes import SleepMode, SleepTrigger
from ai_sleep_constructs.sleep.service import SleepService
from ai_sleep_constructs.sleep.snapshot import ModuleSnapshot
from ai_sleep_constructs.sleep.strategies.base import Strategy
from ai_sleep_constructs.sleep.strategies.head_pruning import AttentionHeadPruning

BOTH = ("queue", "serve")
DEEP = SleepMode.DEEP_SLEEP
MISTRAL = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12, "head_dim": 8,
    "num_key_value_heads": 6, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
    "sliding_window": None,
}
FAMILIES = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**MISTRAL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=128, n_embd=48, n_layer=2, n_head=6, n_positions=128, bos_token_id=0, eos_token_id=None, pad_token_id=0)),
}
IDS = torch.randint(1, 128, (6, 32), generator=torch.Generator().manual_seed(1))
PROMPTS = [IDS[i, : 4 + i] for i in range(6)]


class Letters:
    "A tokenizer of one token a character."

    eos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) % 128 for c in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i) for i in ids)

    def batch_decode(self, ids, skip_special_tokens=False):
        return [self.decode(row) for row in ids]


class OnAnyWeights(Strategy):
    modes = frozenset({SleepMode.LIGHT_SLEEP, DEEP})

    def snapshot(self, context):
        return ModuleSnapshot(context.need("model").modules())


@dataclass
class Noise(OnAnyWeights):
    "Changes the weights one after the other, with pauses in which somebody might see some of them changed."

    name = "noise"
    max_regression: float = 1e9

    def apply(self, context):
        generator = torch.Generator().manual_seed(len(context.state.state_history))
        for parameter in context.model.parameters():
            with torch.no_grad():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
            time.sleep(0.004)
        return {}


class Gate(OnAnyWeights):
    "A night that lasts until the test opens the gate."

    name = "gate"
    opened = threading.Event()
    reached = threading.Event()

    def apply(self, context):
        Gate.reached.set()
        assert Gate.opened.wait(20)
        return {}


class Broken(OnAnyWeights):
    name = "broken"

    def apply(self, context):
        with torch.no_grad():
            next(context.model.parameters()).zero_()
        raise RuntimeError("boom")


class Interrupted(Broken):
    name = "interrupted"

    def apply(self, context):
        raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def gates():
    Gate.opened.clear()
    Gate.reached.clear()
    yield
    Gate.opened.set()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("m") and t.is_alive()]


def adapter_with(*strategies, family="mistral", name="m", **options):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    adapter = HuggingFaceModelAdapter(model, name, tokenizer=Letters(), guard=GuardSet(Letters(), IDS), calibration=IDS)
    adapter.controller.configure_deep_sleep(strategies=list(strategies), max_regression=1e9, pruning_fraction=0.1, **options)
    return adapter


def same(answer, completion):
    return torch.equal(answer.tokens, completion.tokens) and torch.equal(answer.nll, completion.nll)


def alone(model, prompt, n=6):
    "What one version says when nobody else asks, in a thread as the service's own."
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(complete, model, prompt, n, do_sample=False).result()


# ---- the service ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", BOTH)
def test_every_answer_is_one_versions_own(mode, family):
    adapter = adapter_with(Noise, AttentionHeadPruning, family=family)
    answers, done, errors = [], threading.Event(), []
    models = {0: copy.deepcopy(adapter.model)}

    def hammer(index):
        turn = index
        while not done.is_set():
            turn += 1
            try:
                answers.append((turn % 6, service.generate(PROMPTS[turn % 6], 6, do_sample=False)))
            except BaseException as error:
                errors.append(error)

    with SleepService(adapter, mode, workers=3, timeout=30) as service:
        threads = [threading.Thread(target=hammer, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        while len(answers) < 12 and not errors:
            time.sleep(0.005)
        for night in range(1, 4):
            report = service.sleep(mode=DEEP).result()
            assert [s.status for s in report.strategies] == ["committed", "committed"]
            models[night] = copy.deepcopy(service.version.model)
            enough = len(answers) + 12
            while len(answers) < enough and not errors:
                time.sleep(0.005)
        done.set()
        for thread in threads:
            thread.join()
        statistics = service.statistics()
    assert not errors and statistics["failed"] == statistics["timed_out"] == statistics["rejected"] == 0
    assert statistics["served"] == len(answers) and statistics["swaps"] == 3 and statistics["version"] == 3
    expected = {(v, i): alone(model, prompt) for v, model in models.items() for i, prompt in enumerate(PROMPTS)}
    assert len({tuple(e.nll.tolist()) for e in expected.values()}) == 24  # versions can be told apart
    assert all(same(answer, expected[answer.version, prompt]) for prompt, answer in answers)
    assert {answer.version for _, answer in answers} == {0, 1, 2, 3}
    assert {answer.parameters_hash for _, answer in answers} == {hash_model(model) for model in models.values()}
    assert models[3].num_parameters() < models[0].num_parameters() and adapter.model is service.version.model


def test_serve_answers_while_it_sleeps_and_queue_does_not():
    for mode, answered in (("serve", True), ("queue", False)):
        Gate.opened.clear()
        Gate.reached.clear()
        with SleepService(adapter_with(Gate), mode) as service:
            night = service.sleep(mode=DEEP)
            assert Gate.reached.wait(10)
            future = service.submit(PROMPTS[0], 4, do_sample=False)
            if answered:
                assert future.result(10).version == 0 and not night.done()
            else:
                time.sleep(0.1)
                assert not future.done() and service.statistics()["queued"] == 1 and service.statistics()["asleep"]
            Gate.opened.set()
            night.result(10)
            assert future.result(10).version == (0 if answered else 1)


def test_first_come_first_served_and_bounded():
    with SleepService(adapter_with(Gate), "queue", queue_size=12) as service:
        service.sleep(mode=DEEP)
        assert Gate.reached.wait(10)
        order, futures = [], []
        for i in range(12):
            futures.append(service.submit(PROMPTS[i % 6], 2, do_sample=False))
            futures[-1].add_done_callback(lambda _, i=i: order.append(i))
        with pytest.raises(QueueFull, match="12 requests .*queue_size=12"):
            service.submit(PROMPTS[0])
        assert futures[3].cancel()
        late = service.submit(PROMPTS[0], 2, do_sample=False)  # the cancelled one made room
        Gate.opened.set()
        late.result(10)
        assert order == [3, *(i for i in range(12) if i != 3)]
        statistics = service.statistics()
        assert (statistics["rejected"], statistics["cancelled"], statistics["served"]) == (1, 1, 12)
        assert 0 < statistics["latency_p50"] <= statistics["latency_p99"]


@pytest.mark.parametrize("asleep", [True, False])
def test_the_timeout_is_on_time_and_the_request_never_runs(asleep):
    with SleepService(adapter_with(Gate), "queue") as service:
        if asleep:
            service.sleep(mode=DEEP)
            assert Gate.reached.wait(10)
        else:  # the only worker is held up in the middle of an answer
            held = lambda ids, scores, **_: torch.tensor([not (Gate.reached.set() or Gate.opened.wait(20))])  # noqa: E731
            service.submit(PROMPTS[0], 2, stopping_criteria=[held])
            assert Gate.reached.wait(10)
        began = time.monotonic()
        patient = service.submit(PROMPTS[1], 2, do_sample=False)
        short = service.submit(PROMPTS[0], 2, timeout=0.2)
        with pytest.raises(TimeoutError, match=r"m was (asleep|busy) for all of timeout=0.2 s"):
            short.result()
        assert 0.2 <= time.monotonic() - began < 0.5
        with pytest.raises(TimeoutError):
            service.generate(PROMPTS[0], 2, timeout=0.05)
        Gate.opened.set()
        patient.result(10)
        assert service.statistics()["timed_out"] == 2 and service.statistics()["served"] == (1 if asleep else 2)


@pytest.mark.parametrize("mode", BOTH)
def test_a_strategy_that_fails_leaves_the_service_going(mode):
    adapter = adapter_with(Broken)
    model, before = adapter.model, hash_model(adapter.model)
    with SleepService(adapter, mode) as service:
        assert service.sleep(mode=DEEP).result().strategies[0].status == "failed"
        answer = service.generate(PROMPTS[0], 6, do_sample=False)
        assert answer.version == 0 and same(answer, alone(model, PROMPTS[0])) and service.version.model is model
        assert adapter.model is model is adapter.controller.model_state.model and adapter.controller.session is adapter.session
        assert hash_model(model) == before == answer.parameters_hash and service.statistics()["swaps"] == 0


@pytest.mark.parametrize("mode", BOTH)
def test_a_night_that_is_broken_off_leaves_the_service_going(mode):
    adapter = adapter_with(AttentionHeadPruning, Interrupted)
    model, size = adapter.model, adapter.model.num_parameters()
    with SleepService(adapter, mode) as service:
        with pytest.raises(KeyboardInterrupt):
            service.sleep(mode=DEEP).result()
        answer = service.generate(PROMPTS[0], 6, do_sample=False)
        heads = adapter.controller.model_state.attention_heads
        if mode == "serve":  # the copy is dropped, and with it what was recorded of it
            assert answer.version == 0 and model.num_parameters() == size and not heads
        else:  # what was kept before is whole, so it is a version
            assert answer.version == 1 and model.num_parameters() < size and heads
        assert service.version.model is model and same(answer, alone(model, PROMPTS[0]))
        adapter.controller.configure_deep_sleep(strategies=[Noise])
        service.sleep(mode=DEEP).result()
        assert service.generate(PROMPTS[0], 6, do_sample=False).version == answer.version + 1


@pytest.mark.parametrize("mode", BOTH)
def test_a_night_that_keeps_nothing_changes_nothing(mode):
    adapter = adapter_with(Noise)
    adapter.controller.configure_deep_sleep(max_regression=0.0)
    model, session, before = adapter.model, adapter.session, hash_model(adapter.model)
    adapter.controller.guard.bits_per_byte = lambda model: 1.0 if hash_model(model) == before else 2.0
    with SleepService(adapter, mode) as service:
        assert service.sleep(mode=DEEP).result().strategies[0].status == "rolled_back"
        assert service.version.number == 0 and service.version.model is model
    assert adapter.model is model and adapter.session is session is adapter.controller.session and hash_model(model) == before


def test_an_interrupt_takes_the_request_back():
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with SleepService(adapter_with(Gate), "queue") as service:
            night = service.sleep(mode=DEEP)
            assert Gate.reached.wait(10)
            timer = threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                service.generate(PROMPTS[0], 2)
            timer.join()
            Gate.opened.set()
            night.result(10)
            assert service.generate(PROMPTS[1], 2, do_sample=False).version == 1
            assert service.statistics()["cancelled"] == 1 and service.statistics()["served"] == 1
    finally:
        signal.signal(signal.SIGINT, old)


def test_an_interrupt_inside_with_closes():
    with pytest.raises(KeyboardInterrupt), SleepService(adapter_with(Noise), "serve") as service:
        service.sleep(mode=DEEP)
        raise KeyboardInterrupt
    with pytest.raises(ServiceClosed):
        service.submit(PROMPTS[0])


def test_close_is_clear_to_everyone_and_ends_every_thread():
    adapter = adapter_with(Gate)
    service = SleepService(adapter, "queue", workers=3)
    night = service.sleep(mode=DEEP)
    assert Gate.reached.wait(10)
    waiting = [service.submit(PROMPTS[0], 2) for _ in range(4)]
    closing = threading.Thread(target=service.close)
    closing.start()
    for future in waiting:
        with pytest.raises(ServiceClosed, match="m was closed"):
            future.result(10)
    assert closing.is_alive()  # a night under way is finished
    Gate.opened.set()
    closing.join(10)
    assert night.done() and not any(t.is_alive() for t in service._threads)
    service.close()
    for refused in (lambda: service.generate(PROMPTS[0]), service.sleep, lambda: service.conversation().generate(PROMPTS[0])):
        with pytest.raises(ServiceClosed, match="closed"):
            refused()
    assert adapter.controller.initiate_sleep(SleepTrigger.MANUAL) and adapter.controller.wake_up()


def test_a_request_that_raises_is_its_askers_only():
    with SleepService(adapter_with(Noise)) as service:
        bad = service.submit(torch.tensor([4000]), 2)
        worse = service.submit(PROMPTS[0], 2, num_beams=3)
        good = service.submit(PROMPTS[0], 6, do_sample=False)

        def stop(*_, **__):
            raise SystemExit

        worst = service.submit(PROMPTS[0], 2, stopping_criteria=[stop])
        with pytest.raises(ValueError, match=r"0\.\.127"):
            bad.result(10)
        with pytest.raises(ValueError, match="num_beams"):
            worse.result(10)
        with pytest.raises(SystemExit):
            worst.result(10)
        assert same(good.result(10), alone(service.version.model, PROMPTS[0]))
        assert service.generate("abc", 3, do_sample=False).text is not None and service.statistics()["failed"] == 3


def test_conversations_survive_a_change_of_version():
    adapter = adapter_with(Noise, AttentionHeadPruning)
    with SleepService(adapter, "serve", workers=4) as service:
        talk = service.conversation(max_tokens=60)
        old = service.version.model
        turns = [talk.submit(p, 4, do_sample=False) for p in PROMPTS[:3]]  # answered one after the other although all workers are free
        answers = [t.result(10) for t in turns]
        said = torch.empty(0, dtype=torch.long)
        cache = None
        for prompt, answer in zip(PROMPTS, answers, strict=False):
            with ThreadPoolExecutor(1) as pool:
                done = pool.submit(complete, old, torch.cat([said, prompt]), 4, cache, do_sample=False).result()
            assert same(answer, done)
            said, cache = torch.cat([said, prompt, done.tokens]), done.cache
        assert torch.equal(talk.tokens, said) and talk.prefills == 1
        service.sleep(mode=DEEP).result()
        answer = talk.generate(PROMPTS[3], 4, do_sample=False)
        assert answer.version == 1 and same(answer, alone(service.version.model, torch.cat([said, PROMPTS[3]]), 4))
        assert talk.prefills == 2
        said = talk.tokens
        for bad, word in ((torch.tensor([-1]), r"0\.\.127"), (torch.arange(50), "max_tokens=60")):
            with pytest.raises(ValueError, match=word):
                talk.generate(bad, 4)
        assert torch.equal(talk.tokens, said)
        answer = talk.generate(PROMPTS[0], 4, do_sample=False)
        assert same(answer, alone(service.version.model, torch.cat([said, PROMPTS[0]]), 4))


def test_light_sleep_on_a_copy_shortens_the_copied_conversation():
    adapter = adapter_with()
    adapter.controller.configure_light_sleep(kv_cache_retention=0.5, max_regression=1e9)
    adapter.serve(IDS.flatten()[:100])
    session = adapter.session
    with SleepService(adapter, "serve") as service:
        service.sleep(mode=SleepMode.LIGHT_SLEEP).result()
    assert session.cache_tokens == 100 and adapter.session.cache_tokens == 50
    assert adapter.session is adapter.controller.session is adapter.controller.waking.session
    assert adapter.session.model is adapter.model is service.version.model and adapter.session.position == 100
    assert adapter.serve(IDS.flatten()[:10]).isfinite().all()


def test_the_old_model_is_let_go():
    adapter = adapter_with(Noise)
    old = weakref.ref(adapter.model)
    with SleepService(adapter, "serve", workers=2) as service:
        service.generate(PROMPTS[0], 2)
        service.sleep(mode=DEEP).result()
        service.generate(PROMPTS[0], 2)
        for _ in range(50):
            gc.collect()
            if old() is None:
                break
            time.sleep(0.02)
        assert old() is None


def test_nights_begin_through_the_service_only_and_one_at_a_time():
    adapter = adapter_with(Gate)
    adapter.enable_sleep_cycles()
    with SleepService(adapter, "serve") as service:
        logging.disable(logging.CRITICAL)
        assert not adapter.initiate_deep_sleep() and adapter.controller.total_sleep_cycles == 0
        logging.disable(logging.NOTSET)
        with pytest.raises(ValueError, match="served already"):
            SleepService(adapter)
        night = service.sleep(mode=DEEP)
        with pytest.raises(RuntimeError, match="under way"):
            service.sleep(mode=DEEP)
        assert service.sleep_if_triggered() is None
        Gate.opened.set()
        night.result(10)
        adapter.controller.configure_deep_sleep(strategies=[Noise])
        adapter.controller.set_trigger_threshold(SleepTrigger.SCHEDULED, 1e-6)
        assert service.sleep_if_triggered().result().trigger is SleepTrigger.SCHEDULED and service.version.number == 2
        adapter.controller.optimizer = torch.optim.SGD(adapter.model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="optimizer"):
            service.sleep(mode=DEEP).result()
        assert service.generate(PROMPTS[0], 2).version == 2


def test_coroutines():
    async def ask(service):
        return await asyncio.gather(*(service.agenerate(p, 6, do_sample=False) for p in PROMPTS))

    with SleepService(adapter_with(Noise), workers=2) as service:
        for prompt, answer in zip(PROMPTS, asyncio.run(ask(service)), strict=True):
            assert same(answer, alone(service.version.model, prompt))


def test_a_bare_controller_is_served_and_metrics_are_an_adapters():
    adapter = adapter_with(Noise)
    with SleepService(adapter) as service:
        service.generate("abcd", 3, do_sample=False)
    assert {n: len(v) for n, v in adapter.controller.model_state.performance_metrics.items()} == dict.fromkeys(
        ("perplexity", "loss", "inference_time", "memory_usage"), 1)
    with SleepService(adapter.controller) as service:
        before = adapter.controller.waking.active
        assert service.generate(PROMPTS[0], 3).text is None and adapter.controller.waking.active > before
        with pytest.raises(ValueError, match="tokenizer="):
            service.submit("abc")
    assert len(adapter.controller.model_state.performance_metrics["loss"]) == 1


@pytest.mark.parametrize(
    ("options", "word"),
    [({"while_asleep": "wait"}, "while_asleep"), ({"queue_size": 0}, "queue_size"), ({"workers": 1.5}, "workers"),
     ({"timeout": 0}, "timeout"), ({"timeout": float("inf")}, "timeout"), ({"timeout": True}, "timeout")],
)
def test_bad_options_of_a_service(options, word):
    with pytest.raises(ValueError, match=word):
        SleepService(adapter_with(Noise), **options)


def test_what_cannot_be_served():
    with pytest.raises(ValueError, match="no model"):
        SleepService(AISleepController("m"))
    with pytest.raises(TypeError, match="sleeper"):
        SleepService(FAMILIES["mistral"]())
    adapter = adapter_with()
    adapter.controller.initiate_sleep(SleepTrigger.MANUAL)
    with pytest.raises(ValueError, match="asleep"):
        SleepService(adapter)


# ---- generate on the adapter ----


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_tracks_by_itself(family):
    adapter = adapter_with(family=family)
    calls = []
    adapter.model.register_forward_hook(lambda *args: calls.append(args[2].logits.shape[1]))
    tokens = adapter.generate(PROMPTS[5], 7, do_sample=False)
    assert sum(calls) == len(PROMPTS[5]) + 7 - 1  # every token was read once, and no more
    text = torch.cat([PROMPTS[5], tokens])
    with torch.no_grad():
        logits = adapter.model(text[None]).logits[0]
        plain = adapter.model.generate(PROMPTS[5][None], max_new_tokens=7, do_sample=False)[0, len(PROMPTS[5]) :]
    nll = torch.nn.functional.cross_entropy(logits[:-1], text[1:])
    metrics = {name: values[-1] for name, values in adapter.controller.model_state.performance_metrics.items()}
    assert torch.equal(tokens, plain) and abs(metrics["loss"] - float(nll)) < 1e-5
    assert abs(metrics["perplexity"] - float(nll.exp())) < 1e-2 and 0 < metrics["inference_time"] < 1
    width = {"gpt2": 48, "mistral": 6 * 8}[family]
    assert metrics["memory_usage"] == 2 * 2 * 4 * width * (len(text) - 1) / 2**20
    assert adapter.controller.performance_monitor.total_samples == 4 and adapter.session.cache_tokens == 0
    assert isinstance(adapter.generate("abc", 3, do_sample=True, temperature=0.7), str)


def test_generate_refuses_before_anything_is_tracked():
    adapter = adapter_with(family="gpt2")
    for arguments, word in (
        ((torch.tensor([], dtype=torch.long),), "prompt"), ((torch.tensor([128]),), r"0\.\.127"), ((torch.tensor([[1]]),), "prompt"),
        ((PROMPTS[0], 0), "max_new_tokens"), ((PROMPTS[0], True), "max_new_tokens"), ((PROMPTS[0], 200), "128 learned positions"),
    ):
        with pytest.raises(ValueError, match=word):
            adapter.generate(*arguments)
    with pytest.raises(ValueError, match="num_return_sequences"):
        adapter.generate(PROMPTS[0], 3, num_return_sequences=2)
    assert len(adapter.generate(PROMPTS[0], 125, do_sample=False)) == 125  # up to the last position
    adapter.controller.initiate_sleep(SleepTrigger.MANUAL)
    with pytest.raises(RuntimeError, match="asleep"):
        adapter.generate(PROMPTS[0])
    with pytest.raises(RuntimeError, match="no model"):
        HuggingFaceModelAdapter(None, "m").generate("x")
    adapter.controller.wake_up()
    adapter.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        adapter.generate("abc")
    assert adapter.controller.performance_monitor.total_samples == 4


# ---- the coordinator ----


def members(n):
    return [AISleepController(f"m{i}") for i in range(n)]


@pytest.mark.parametrize("min_awake", [0, 1, 3, 5])
def test_enough_stay_awake_whatever_the_threads_ask(min_awake):
    controllers, lock, asleep, most, nights = members(6), threading.Lock(), set(), [0], []
    for controller in controllers:
        def fall(mode, trigger, name=controller.model_id):
            with lock:
                asleep.add(name)
                nights.append(name)
                most[0] = max(most[0], len(asleep))
            time.sleep(0.003)

        def wake(name=controller.model_id):
            with lock:
                asleep.discard(name)

        controller.register_callback("on_sleep_start", fall)
        controller.register_callback("on_sleep_end", wake)
    triggers = list(SleepTrigger)
    with SleepCoordinator(controllers, min_awake) as coordinator:
        def ask(k):
            for i in range(12):
                coordinator.request_sleep(f"m{(i * 5 + k) % 6}", triggers[(i + k) % 7]).result(20)
                assert len(coordinator.serving()) >= min_awake

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(ask, k) for k in range(8)]:
                done.result(30)
        assert coordinator.serving() == list(coordinator.members) and not coordinator.waiting()
    assert 1 <= most[0] <= 6 - min_awake and set(nights) == set(coordinator.members)
    assert most[0] > 1 or min_awake == 5


def test_the_idle_one_is_not_starved_by_those_that_always_drift():
    order = []
    controllers = members(4)
    for controller in controllers:
        controller.register_callback("on_sleep_start", lambda mode, trigger, n=controller.model_id: order.append(n))
    with SleepCoordinator(controllers, min_awake=3) as coordinator:
        stop = threading.Event()

        def again(name):
            if not stop.is_set():
                coordinator.request_sleep(name, SleepTrigger.DRIFT_DETECTED).add_done_callback(lambda _: again(name))

        with coordinator.permit("m0"):
            idle = coordinator.request_sleep("m3", SleepTrigger.IDLE_TIMEOUT)
            while not coordinator.waiting():
                time.sleep(0.001)
            for name in ("m0", "m1", "m2"):
                again(name)
            while len(coordinator.waiting()) < 4:
                time.sleep(0.001)
            assert coordinator.waiting()[0] != "m3"
        idle.result(10)
        stop.set()
    assert 3 <= order.index("m3") <= 4  # the urgent ones first, but not more of them than there are models


def test_the_longest_awake_goes_first_and_urgency_before_that():
    order = []
    controllers = members(4)
    for controller in controllers:
        controller.register_callback("on_sleep_start", lambda mode, trigger, n=controller.model_id: order.append(n))
    with SleepCoordinator(controllers, min_awake=3) as coordinator:
        for name in ("m2", "m0"):
            coordinator.request_sleep(name).result(10)
        with coordinator.permit("m1"):
            futures = [coordinator.request_sleep(n, SleepTrigger.SCHEDULED) for n in ("m0", "m2", "m3")]
            futures.append(coordinator.request_sleep("m1", SleepTrigger.MEMORY_PRESSURE))
            while len(coordinator.waiting()) < 4:
                time.sleep(0.001)
            assert coordinator.request_sleep("m0") is futures[0]
        for future in futures:
            future.result(10)
    assert order == ["m2", "m0", "m1", "m3", "m2", "m0"]


def test_permits_come_back_whatever_happens():
    controllers = members(2)
    with SleepCoordinator(controllers) as coordinator:
        with pytest.raises(ZeroDivisionError), coordinator.permit("m0"):
            assert coordinator.serving() == ["m1"]
            began = time.monotonic()
            with pytest.raises(TimeoutError, match="m1 got no permit"), coordinator.permit("m1", timeout=0.1):
                pass
            assert 0.1 <= time.monotonic() - began < 0.4
            raise ZeroDivisionError
        assert coordinator.serving() == ["m0", "m1"]
        controllers[0].register_callback("on_sleep_start", lambda mode, trigger: 1 / 0)
        logging.disable(logging.CRITICAL)
        with pytest.raises(RuntimeError, match="did not fall asleep"):
            coordinator.request_sleep("m0").result(10)
        assert not controllers[1].initiate_sleep(SleepTrigger.MANUAL)  # no permit, no sleep
        logging.disable(logging.NOTSET)
        assert coordinator.serving() == ["m0", "m1"]
        with coordinator.permit("m1"):
            assert controllers[1].initiate_sleep(SleepTrigger.MANUAL) and controllers[1].wake_up()
            late = coordinator.request_sleep("m0")
            closing = threading.Thread(target=coordinator.close)
            closing.start()
            with pytest.raises(RuntimeError, match="closed"):
                late.result(10)
            closing.join(10)
    for refused in (lambda: coordinator.request_sleep("m0"), lambda: coordinator.permit("m0").__enter__()):
        with pytest.raises(RuntimeError, match="closed"):
            refused()
    assert controllers[1].initiate_sleep(SleepTrigger.MANUAL)


def test_bad_ensembles():
    with pytest.raises(ValueError, match="min_awake=3 of 3 members: none could ever sleep"):
        SleepCoordinator(members(3), 3)
    with pytest.raises(ValueError, match="none could ever sleep"):
        SleepCoordinator(members(1))
    for bad in (-1, True, 1.0):
        with pytest.raises(ValueError, match="min_awake"):
            SleepCoordinator(members(3), bad)
    with pytest.raises(ValueError, match="two are named"):
        SleepCoordinator([*members(2), AISleepController("m0")])
    with pytest.raises(TypeError, match="members"):
        SleepCoordinator(["m0", "m1"])
    sleeper = members(2)
    sleeper[1].initiate_sleep(SleepTrigger.MANUAL)
    with pytest.raises(ValueError, match="m1 is asleep"):
        SleepCoordinator(sleeper)
    with SleepCoordinator(members(2)) as coordinator:
        with pytest.raises(ValueError, match="coordinator already"):
            SleepCoordinator(coordinator.members.values())
        with pytest.raises(KeyError, match="m9"):
            coordinator.request_sleep("m9")
        with pytest.raises(TypeError, match="trigger"):
            coordinator.request_sleep("m0", "manual")


def test_an_ensemble_of_services_answers_all_night():
    services = [SleepService(adapter_with(Noise, name=f"m{i}"), "queue", timeout=20) for i in range(3)]
    answers = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SleepCoordinator(services, min_awake=2) as coordinator:
            futures = [coordinator.request_sleep(name, mode=DEEP) for name in coordinator.members]
            while not all(f.done() for f in futures):
                name = coordinator.serving()[0]
                answers.append((name, coordinator.members[name].generate(PROMPTS[0], 2, do_sample=False)))
            assert [f.result().model_id for f in futures] == ["m0", "m1", "m2"]
    for service in services:
        assert service.version.number == 1
        service.close()
    assert answers and all(f.exception() is None for f in futures)
    with pytest.raises((CancelledError, ServiceClosed)):
        services[0].generate(PROMPTS[0])
