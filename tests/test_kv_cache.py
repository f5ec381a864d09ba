"""Eviction, quantisation and generation on every family of models, against masked caches, eager attention and kvpress."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ai_sleep_constructs import load_corpus, load_model
from ai_sleep_constructs.reference.architecture import attention_blocks
from ai_sleep_constructs.sleep.eviction import OBSERVERS, POLICIES, choose_entries, evict, observe, unbroken
from ai_sleep_constructs.sleep.generation import generate, stream
from ai_sleep_constructs.sleep.guard import GuardSet
from ai_sleep_constructs.sleep.kv_quantization import PackedLayer, pack, pack_cache, unpack_cache
from ai_sleep_constructs.sleep.session import Session, check_evictable
from ai_sleep_constructs.sleep.state import LMModelState
from ai_sleep_constructs.sleep.strategies.base import SleepContext, run_transaction
from ai_sleep_constructs.sleep.strategies.head_pruning import AttentionHeadPruning
from ai_sleep_constructs.sleep.strategies.kv_cache import KVCacheManagement
from families import FAMILIES

IDS = torch.randint(1, 128, (200,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES)
def tiny(request):
    torch.manual_seed(0)
    model = FAMILIES[request.param]()
    with torch.no_grad():  # sharper than at initialisation, so that positions and entries matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="module")
def reference():
    return load_model("reference")


@pytest.fixture(scope="module")
def text(reference):
    return torch.tensor(reference.tokenizer("".join(load_corpus("python", "guard", max_bytes=60_000).texts))["input_ids"])


def masked(model, cache, chosen, ids, position):
    "Logits for `ids` through a whole cache of which each layer and group may see only its chosen entries."
    blocks, tokens, then = attention_blocks(model), cache.get_seq_length(), len(ids)

    def hide(block):
        def hook(module, args, kwargs):
            before = torch.zeros(1, block.groups, 1, tokens, dtype=torch.bool).scatter(3, chosen[block.layer][:, :, None], True)
            after = torch.ones(then, then, dtype=torch.bool).tril().expand(1, block.groups, then, then)
            mask = torch.cat([before.expand(1, block.groups, then, tokens), after], dim=-1)
            return args, {**kwargs, "attention_mask": mask.repeat_interleave(block.heads_per_group, dim=1)}
        return hook

    hooks = [block.module.register_forward_pre_hook(hide(block), with_kwargs=True) for block in blocks]
    try:
        return plain(model, cache, ids, position)
    finally:
        for hook in hooks:
            hook.remove()


def plain(model, cache, ids, position):
    "Logits for `ids` at the positions from `position` on."
    positions = torch.arange(position, position + len(ids))[None]
    with torch.no_grad():
        return model(ids[None], past_key_values=copy.deepcopy(cache), position_ids=positions).logits


# ---- true positions ----


def test_going_on_equals_a_masked_cache_in_every_family(tiny):
    tiny.double()
    for policy in ("recency", "key_diff", "random"):
        session = Session(tiny)
        session.read(IDS[:120])
        chosen, whole = choose_entries(session.cache, 40, policy, recent=0.1), copy.deepcopy(session.cache)
        evict(session.cache, 40, policy, recent=0.1)
        expected = masked(tiny, whole, chosen, IDS[120:150], 120)
        assert (plain(tiny, session.cache, IDS[120:150], 120) - expected).abs().max() < 1e-5
        assert (plain(tiny, session.cache, IDS[120:150], 40) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("read", "keep", "then"), [(512, 256, 64), (500, 100, 50), (300, 60, 1)])
def test_the_difference_is_exactly_zero_in_float64(reference, text, read, keep, then):
    model = copy.deepcopy(reference.model).double()
    session = Session(model)
    session.read(text[:read])
    chosen, whole = choose_entries(session.cache, keep, "key_diff"), copy.deepcopy(session.cache)
    evict(session.cache, keep, "key_diff")
    expected = masked(model, whole, chosen, text[read : read + then], read)
    assert torch.equal(plain(model, session.cache, text[read : read + then], read), expected)
    assert (plain(model, session.cache, text[read : read + then], keep) - expected).abs().max() > 1


# ---- policies ----


@pytest.mark.parametrize(
    ("press", "policy", "sinks"),
    [("KeyDiffPress", "key_diff", 0), ("KnormPress", "key_norm", 0), ("StreamingLLMPress", "recency", 4), ("SnapKVPress", "snapkv", 0)],
)
def test_the_same_entries_as_kvpress_in_every_layer(reference, press, policy, sinks):
    record = json.loads((Path(__file__).parent / "data" / "kvpress_kept.json").read_text())
    ids, window = torch.tensor(record["ids"]), record["window"]
    session = Session(reference.model)
    session.read(ids)
    queries = observe(reference.model, session.cache, ids[-window:], len(ids)) if policy in OBSERVERS else None
    for layers in record["kept"][press].values():
        theirs = torch.tensor(layers)
        ours = choose_entries(session.cache, theirs.shape[-1], policy, sinks, 0.0, queries=queries)
        assert torch.equal(torch.cat(ours), theirs)
        assert 0 < theirs.shape[-1] < len(ids)


def test_observed_queries_give_the_attention_of_the_model(tiny):
    session = Session(tiny)
    session.read(IDS[:100])
    queries = observe(tiny, session.cache, IDS[88:100], 100)
    assert session.cache_tokens == 100 and not any(b.module._forward_pre_hooks for b in attention_blocks(tiny))
    eager = copy.deepcopy(tiny)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = eager(IDS[None, :100], output_attentions=True).attentions
    hidden = torch.ones(12, 100, dtype=torch.bool).triu(89)
    for layer, (own, attention) in enumerate(zip(queries, attentions, strict=True)):
        keys = session.cache.layers[layer].keys
        rebuilt = (own @ keys.repeat_interleave(own.shape[1] // keys.shape[1], 1).mT).masked_fill(hidden, -torch.inf).softmax(-1)
        assert (rebuilt - attention[:, :, -12:]).abs().max() < 1e-4
        assert attention[:, :, -12:].std() > 1e-3


def test_snapkv_keeps_what_the_window_attends_to(reference, text):
    session = Session(reference.model)
    session.read(text[:200])
    queries = observe(reference.model, session.cache, text[184:200], 200)
    chosen = choose_entries(session.cache, 60, "snapkv", 0, 0.0, queries=queries)
    other = choose_entries(session.cache, 60, "random", 0, 0.0)
    for layer, (kept, control, own) in enumerate(zip(chosen, other, queries, strict=True)):
        keys = session.cache.layers[layer].keys
        mass = (own.unflatten(1, (4, 2)).flatten(2, 3) @ keys[:, :, :184].mT).softmax(-1).mean(2)
        inside = mass.gather(2, kept.clamp(max=183)[..., :44]).sum(-1)
        by_chance = torch.where(control < 184, mass.gather(2, control.clamp(max=183)), 0.0).sum(-1)
        assert inside.mean() > by_chance.mean() + 0.1
        assert torch.equal(kept[0, :, -16:], torch.arange(184, 200).expand(4, 16))


def test_gaps_are_known_after_an_eviction(reference, text):
    session = Session(reference.model)
    session.read(text[:100])
    assert unbroken(session.cache) == 100
    evict(session.cache, 50, "key_norm", recent=0.0)
    few = unbroken(session.cache)
    assert few < 50
    with pytest.raises(ValueError, match=f"1 to {few},"):
        observe(reference.model, session.cache, text[100 - few - 1 : 100], 100)
    session.read(text[100:108])
    assert unbroken(session.cache) == few + 8
    observe(reference.model, session.cache, text[100:108], 108)
    recent = Session(reference.model)
    recent.read(text[:100])
    evict(recent.cache, 40, "recency", sinks=4)
    assert unbroken(recent.cache) == 36


def test_bad_input_changes_nothing(reference, text):
    session = Session(reference.model)
    session.read(text[:40])
    keys = [layer.keys for layer in session.cache.layers]
    for call in (lambda: evict(session.cache, 0.5, "oldest"), lambda: evict(session.cache, 0.5, "snapkv"), lambda: pack_cache(session.cache, 2)):
        with pytest.raises(ValueError, match="oldest|queries|bits"):
            call()
    static = StaticCache(reference.model.config, max_cache_len=16)
    for call in (lambda: evict(static), lambda: pack_cache(static, 8), lambda: observe(reference.model, static, text[:4], 4)):
        with pytest.raises(TypeError, match="StaticLayer"):
            call()
    assert all(layer.keys is k for layer, k in zip(session.cache.layers, keys, strict=True))
    assert set(POLICIES) | set(OBSERVERS) == {"recency", "key_norm", "key_diff", "random", "snapkv"}
    evict(session.cache, 0.5, "random", seed=1)
    again = Session(reference.model)
    again.read(text[:40])
    other = copy.deepcopy(again.cache)
    evict(again.cache, 0.5, "random", seed=1)
    evict(other, 0.5, "random", seed=2)
    assert torch.equal(again.cache.layers[0].keys, session.cache.layers[0].keys)
    assert not torch.equal(again.cache.layers[0].keys, other.layers[0].keys)


# ---- the strategy ----


@pytest.mark.parametrize(
    "options",
    [{"kv_cache_recent": 1.5}, {"kv_cache_bits": 3}, {"kv_cache_bits": True}, {"kv_cache_window": 0}, {"kv_cache_seed": -1}, {"kv_cache_policy": "x"}],
)
def test_options_are_checked(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        KVCacheManagement(**options)


def test_snapkv_sees_the_right_text_in_the_guard(reference, text, monkeypatch):
    "The observed tokens must be those of the batch whose cache is shortened, in more than one batch."
    from ai_sleep_constructs.sleep.strategies import kv_cache

    seen = []

    def spy(model, cache, ids, position):
        entered = model.get_input_embeddings()(ids if ids.ndim == 2 else ids[None])
        seen.append(ids)
        first = attention_blocks(model)[0]
        normed = model.model.layers[0].input_layernorm(entered)
        values = first.module.v_proj(normed).unflatten(-1, (-1, 32)).transpose(1, 2)
        cached = cache.layers[0].values[:, :, -ids.shape[-1] :]
        assert torch.allclose(values.reshape(cached.shape), cached, atol=1e-4)
        return observe(model, cache, ids, position)

    monkeypatch.setattr(kv_cache, "observe", spy)
    guard = GuardSet(reference.tokenizer, text[: 6 * 64].view(6, 64), batch_size=4)
    session = Session(reference.model)
    session.read(text[:150])
    strategy = KVCacheManagement(kv_cache_retention=0.5, kv_cache_policy="snapkv", max_regression=1.0)
    report = run_transaction(strategy, SleepContext(LMModelState("m"), reference.model, session, guard))
    assert report.status == "committed", report.message
    assert [tuple(i.shape) for i in seen] == [(16,), (4, 16), (2, 16)]


def test_the_guard_decides_about_bits(reference, text):
    guard = GuardSet(reference.tokenizer, text[: 8 * 128].view(8, 128))
    for limit, status in ((1.0, "committed"), (0.0, "rolled_back")):
        session = Session(reference.model)
        session.read(text[:200])
        layers = list(session.cache.layers)
        strategy = KVCacheManagement(kv_cache_retention=1.0, kv_cache_bits=4, max_regression=limit)
        report = run_transaction(strategy, SleepContext(LMModelState("m"), reference.model, session, guard))
        assert report.status == status and report.bits_before != report.bits_after
        kinds = {type(layer) for layer in session.cache.layers}
        assert kinds == ({PackedLayer} if status == "committed" else {type(layers[0])})
        if status == "rolled_back":
            assert all(a is b for a, b in zip(session.cache.layers, layers, strict=True))
        else:
            assert report.details["bytes_after"] == session.cache_bytes < report.details["bytes_before"] / 4
        assert session.score(text[200:220]).isfinite().all()


# ---- quantisation ----


def test_packed_numbers_are_near_and_small():
    numbers = torch.randn(2, 3, 4, 32, 8, generator=torch.Generator().manual_seed(0)) * 5 + 3
    for bits, factor in ((8, 3.0), (4, 5.0)):
        packed = pack(numbers, bits, dim=3)
        back = packed.unpack(torch.float32)
        assert (back - numbers).abs().max() <= 0.51 * packed.scale.float().max() and not torch.equal(back, numbers)
        assert numbers.nbytes / packed.nbytes > factor
        assert (pack(back, bits, dim=3).unpack(torch.float32) - back).abs().max() <= 0.6 * packed.scale.float().max()
    constant = torch.full((1, 1, 1, 32, 8), 2.5)
    assert torch.equal(pack(constant, 4, dim=3).unpack(torch.float32), constant)
    for bad in (torch.full((1, 4), torch.nan), torch.full((1, 4), 1e6)):
        with pytest.raises(ValueError, match="float16"):
            pack(bad, 8, dim=1)


def test_a_packed_cache_serves_in_every_family(tiny):
    session = Session(tiny)
    session.read(IDS[:100])
    whole, twin = session.cache_bytes, copy.deepcopy(session.cache)
    done = pack_cache(session.cache, 8)
    assert done["bytes_before"] == whole and done["bytes_after"] == session.cache_bytes < whole / 2
    held = 0
    for layer in session.cache.layers:
        for part in (layer.packed_keys, layer.packed_values):
            held += sum(t.numel() * t.element_size() for t in (part.codes, part.scale, part.low))
        held += sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
    assert held == session.cache_bytes
    with pytest.raises(TypeError, match="PackedLayer"):
        check_evictable(session.cache)
    with pytest.raises(NotImplementedError, match="unpack_cache"):
        session.cache.crop(-1)
    unpacked = copy.deepcopy(session.cache)
    unpack_cache(unpacked)
    assert torch.equal(plain(tiny, session.cache, IDS[100:120], 100), plain(tiny, unpacked, IDS[100:120], 100))
    difference = (plain(tiny, session.cache, IDS[100:120], 100) - plain(tiny, twin, IDS[100:120], 100)).abs().max()
    assert 0 < difference < 0.5
    session.score(IDS[100:140])
    assert session.cache_tokens == 140 and session.cache.layers[0].stored == 96
    pack_cache(session.cache, 8)
    assert session.cache.layers[0].stored == 128 and session.cache_tokens == 140
    pack_cache(session.cache, 4)
    assert session.cache.layers[0].bits == 4 and session.cache_tokens == 140


def test_an_error_while_serving_leaves_a_packed_cache_as_it_was(reference, text, monkeypatch):
    session, twin = Session(reference.model), Session(reference.model)
    for one in (session, twin):
        one.read(text[:100])
        pack_cache(one.cache, 4)
    last = attention_blocks(reference.model)[-1].module
    handle = last.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        session.score(text[100:110])
    handle.remove()
    assert session.position == 100 and {layer.get_seq_length() for layer in session.cache.layers} == {100}
    assert torch.equal(session.score(text[100:110]), twin.score(text[100:110]))


# ---- generation ----


def test_greedy_writes_what_transformers_writes_bit_for_bit(tiny):
    theirs = tiny.generate(
        IDS[None, :50], max_new_tokens=20, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    session = Session(tiny)
    first = session.read(IDS[:50])
    logits = [first, *(session.next_logits for _ in stream(session, max_new_tokens=20, eos_token_id=()))]
    assert session.recent[50:].tolist() == theirs.sequences[0, 50:].tolist()
    assert torch.equal(torch.stack(logits[:-1]), torch.cat(theirs.logits))
    assert len(set(session.recent[50:].tolist())) > 3


def test_after_an_eviction_it_writes_what_a_masked_cache_expects(reference, text):
    model = copy.deepcopy(reference.model).double()
    session = Session(model)
    session.read(text[:200])
    chosen, whole = choose_entries(session.cache, 80, "key_diff"), copy.deepcopy(session.cache)
    evict(session.cache, 80, "key_diff")
    first = int(session.next_logits.argmax())
    written = generate(session, max_new_tokens=10)
    expected = masked(model, whole, chosen, written, 200)[0].argmax(-1)
    assert int(written[0]) == first and torch.equal(expected[:-1], written[1:])
    assert session.position == 210 and session.cache_tokens == 90
    following = masked(model, whole, chosen, torch.cat([written, text[200:205]]), 200)[0, 9:14]
    nll = torch.nn.functional.cross_entropy(following, text[200:205], reduction="none")
    assert (session.score(text[200:205]) - nll).abs().max() < 1e-5  # `score` returns float32


def test_it_stops_at_the_end_token_and_for_a_reader_who_leaves(reference, text):
    def fresh():
        session = Session(reference.model)
        session.read(text[:60])
        return session

    free = generate(fresh(), max_new_tokens=12, eos_token_id=())
    stop = int(free[5])
    short = generate(fresh(), max_new_tokens=12, eos_token_id=[stop])
    assert short.tolist() == free.tolist()[: free.tolist().index(stop) + 1]
    session = fresh()
    for count, token in enumerate(stream(session, max_new_tokens=12, eos_token_id=()), 1):
        assert int(session.recent[-1]) == token and session.position == 60 + count
        if count == 3:
            break
    rest = generate(session, max_new_tokens=9, eos_token_id=())
    assert [*session.recent[60:63].tolist(), *rest.tolist()] == free.tolist()
    draws = [generate(fresh(), max_new_tokens=8, temperature=1.5, seed=seed).tolist() for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    end = copy.deepcopy(reference.model)
    end.generation_config.eos_token_id = stop
    session = Session(end)
    assert generate(session, text[:60], 12).tolist() == short.tolist()


def test_bad_requests_are_refused_before_anything_is_read():
    torch.manual_seed(0)
    session = Session(FAMILIES["gpt2"]().eval())
    with pytest.raises(RuntimeError, match="nothing has been served"):
        generate(session)
    for options, word in (({"max_new_tokens": 207}, "206|learned positions"), ({"max_new_tokens": -1}, "max_new_tokens"), ({"temperature": -1.0}, "temperature")):
        with pytest.raises(ValueError, match=word):
            stream(session, IDS[:50], **options)
    assert session.position == 0 and not session.cache_tokens
    assert len(generate(session, IDS[:50], 206, eos_token_id=())) == 206 and session.positions_left == 0
    assert isinstance(session.cache, DynamicCache)


def test_heads_are_pruned_while_a_packed_cache_is_bound(tiny):
    session = Session(tiny)
    session.read(IDS[:64])
    pack_cache(session.cache, 8)
    packed = list(session.cache.layers)
    context = SleepContext(LMModelState("tiny"), tiny, session, calibration=IDS[:64].view(4, 16))
    strategy = AttentionHeadPruning(pruning_fraction=0.34)
    saved = strategy.snapshot(context)
    report = strategy.apply(context)
    assert report["groups_after"] < report["groups_before"]
    assert session.score(IDS[64:80]).isfinite().all()
    saved.restore()
    assert session.cache.layers == packed and attention_blocks(tiny)[0].groups == report["groups_before"] // 3
