"""Scores of hidden states: against the model's own attention, under padding, over lengths, with bad input, saved and loaded."""

import json

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

from ai_sleep_constructs.cmr.scoring import RelevanceScorer, ScoreReference, loss_gradients, token_surprise
from ai_sleep_constructs.cmr.scoring_methods import SCORING_METHODS, ScoredText, scoring_method
from ai_sleep_constructs.reference.corpus import load_corpus
from ai_sleep_constructs.reference.loading import load_model

LAYER = 4
NEEDS = {
    "attention_based": ["queries", "keys"],
    "gradient_based": ["gradients"],
    "surprise": ["nll"],
    "surprise_recency": ["nll"],
    "hybrid": ["queries", "keys", "nll"],
}


@pytest.fixture(scope="module")
def reference():
    return load_model("reference")


@pytest.fixture(scope="module")
def stream(reference) -> Tensor:
    texts = load_corpus("python", "guard", max_bytes=600_000).texts
    return torch.cat([reference.tokenizer(text, return_tensors="pt").input_ids[0] for text in texts])


def signals_of(model, ids: Tensor, with_gradients: bool = True) -> dict[str, Tensor]:
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(with_gradients)
    with torch.set_grad_enabled(with_gradients):
        out = model(inputs_embeds=embeddings, output_hidden_states=True, use_cache=False)
        layer, states, nll = model.model.layers[LAYER], out.hidden_states[LAYER], token_surprise(out.logits, ids)
        extra = {"gradients": torch.autograd.grad(nll.sum(), states)[0]} if with_gradients else {}
    attention, states = layer.self_attn, states.detach()
    with torch.no_grad():
        normed = layer.input_layernorm(states)
        shape = (*ids.shape, -1, attention.head_dim)
        queries, keys = (project(normed).view(shape).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
        queries, keys = apply_rotary_pos_emb(queries, keys, *model.model.rotary_emb(normed, torch.arange(ids.shape[1])[None]))
    return {"hidden_states": states, "queries": queries, "keys": keys, "nll": nll.detach()} | extra


@pytest.fixture(scope="module")
def text(reference, stream) -> dict[str, Tensor]:
    return signals_of(reference.model, stream[: 2 * 96].view(2, 96))


def given_to(name: str, signals: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: signals[key] for key in ["hidden_states", *NEEDS.get(name, [])]}


def as_text(states: Tensor, mask: Tensor | None = None, *, block_bytes: int = 2**24, window: int | None = None, **signals) -> ScoredText:
    mask = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask
    return ScoredText(states, mask, signals, lambda name: torch.zeros(0), torch.Generator(), block_bytes, window)


@pytest.mark.parametrize("block_bytes", [1, 50_000, 2**24])
def test_received_attention_is_the_models_own(reference, stream, text, block_bytes):
    ids = stream[: 2 * 96].view(2, 96)
    reference.model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = reference.model(ids, output_attentions=True).attentions[LAYER].mean(1)  # [B, T, T]
    reference.model.set_attn_implementation("sdpa")
    even = (1 / torch.arange(1, 97)).flip(0).cumsum(0).flip(0)
    part = as_text(text["hidden_states"], block_bytes=block_bytes, queries=text["queries"], keys=text["keys"])
    raw = SCORING_METHODS["attention_based"].raw(part)
    assert torch.allclose(raw, attention.sum(1) / even, atol=1e-4)


def test_received_attention_honours_a_window():
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
    ahead = torch.arange(40)[:, None] - torch.arange(40)
    seen = (ahead >= 0) & (ahead < 7)
    weights = queries @ keys.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
    weights = weights.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = weights.mean(1).sum(1) / (seen / seen.sum(1, keepdim=True)).sum(0)
    for block_bytes in (1, 4 * 4 * 40 * 11, 2**24):
        part = as_text(torch.randn(1, 40, 8), block_bytes=block_bytes, window=7, queries=queries, keys=keys)
        assert torch.allclose(SCORING_METHODS["attention_based"].raw(part), expected, atol=1e-5)


def test_novelty_against_all_pairs_and_memories(text):
    states, memories = text["hidden_states"], text["hidden_states"][1, :30]
    for block_bytes in (1, 2**24):
        raw = SCORING_METHODS["novelty"].raw(as_text(states[:1], block_bytes=block_bytes))
        cosines = torch.cosine_similarity(states[0, :, None], states[0, None], dim=-1)
        cosines = cosines.masked_fill(~torch.ones(96, 96, dtype=torch.bool).tril(-1), -torch.inf)
        assert torch.allclose(raw[0, 1:], 1 - cosines.amax(1)[1:], atol=1e-5)
        assert raw[0, 0] == 1
        known = SCORING_METHODS["novelty"].raw(as_text(states[1:], block_bytes=block_bytes, memories=memories))
        assert known[0, :30].abs().max() < 1e-5  # they are the memories
        assert known[0, 30:].mean() > 0.01


def test_gradients_predict_a_change_of_the_loss_in_every_family(reference, stream):
    torch.manual_seed(0)
    small = {"vocab_size": 100, "max_position_embeddings": 64}
    llama = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, **small)
    for model, blocks in (
        (LlamaForCausalLM(llama), "model.layers"),
        (GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, resid_pdrop=0.5, **small)), "transformer.h"),
    ):
        model.double().requires_grad_(False)  # frozen weights are no obstacle
        ids, mask = torch.randint(100, (2, 20)), torch.ones(2, 20, dtype=torch.long)
        mask[1, 15:] = 0
        model.train()  # dropout must not disturb
        gradient = loss_gradients(model, ids, 1, mask)
        assert model.training
        assert gradient[1, 15:].abs().max() == 0  # padding is no part of the loss
        model.eval()
        direction = torch.randn(2, 20, 32, dtype=torch.float64)

        def loss(step: float, model=model, blocks=blocks, ids=ids, mask=mask, direction=direction) -> float:
            block = model.get_submodule(blocks)[1]
            hook = block.register_forward_pre_hook(lambda module, args: (args[0] + step * direction, *args[1:]))
            nll = torch.nn.functional.cross_entropy(model(ids, attention_mask=mask).logits[:, :-1].mT, ids[:, 1:], reduction="none")
            hook.remove()
            return float((nll * mask[:, 1:]).sum())

        assert float((gradient * direction).sum()) == pytest.approx((loss(1e-3) - loss(-1e-3)) / 2e-3, rel=1e-3)
        assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="layer must be 0 to 6, not 7"):
        loss_gradients(reference.model, stream[:10][None], 7)


def test_surprise_is_the_models_loss_and_starts_at_the_first_token(reference, stream):
    ids = stream[:40][None]
    with torch.no_grad():
        out = reference.model(ids, labels=ids)
    nll = token_surprise(out.logits, ids)
    assert torch.allclose(nll[0, 1:].mean(), out.loss, atol=1e-5)
    padded = token_surprise(out.logits, ids, (torch.arange(40) >= 5).long()[None])
    assert padded[0, :5].abs().max() == 0
    assert padded[0, 5] == nll[0, 0] == pytest.approx(torch.tensor(out.logits.shape[-1]).log().item())
    assert torch.equal(padded[0, 6:], nll[0, 6:])


@pytest.mark.parametrize("name", sorted(SCORING_METHODS.keys() - {"random"}))  # random numbers are drawn for the whole batch
def test_padding_scores_nothing_and_changes_nothing(text, name):
    alone = {key: value[:1, ..., :70, :] if value.ndim > 2 else value[:1, :70] for key, value in given_to(name, text).items()}
    expected = RelevanceScorer(text["hidden_states"].shape[-1], name)(**alone)
    assert expected.dtype == torch.float32 and expected.min() >= 0 and expected.max() <= 1
    for left in (0, 11):  # padding right and on both sides
        mask = torch.zeros(2, 96)
        mask[0, left : left + 70], mask[1] = 1, 1
        batch = {}
        for key, value in given_to(name, text).items():
            batch[key] = value.clone()
            row = batch[key][0] if value.ndim == 3 or value.ndim == 2 else batch[key][0].transpose(0, 1)
            row[:] = torch.nan  # what stands at padding does not matter
            row[left : left + 70] = alone[key][0] if value.ndim < 4 else alone[key][0].transpose(0, 1)
        scores = RelevanceScorer(text["hidden_states"].shape[-1], name)(attention_mask=mask, **batch)
        assert torch.allclose(scores[0, left : left + 70], expected[0], atol=1e-6)
        assert scores[0, :left].abs().sum() + scores[0, left + 70 :].abs().sum() == 0


@pytest.mark.parametrize("name", sorted(SCORING_METHODS))
def test_every_method_orders_by_its_raw_score_and_needs_its_signals(text, name):
    width = text["hidden_states"].shape[-1]
    scores = RelevanceScorer(width, name, seed=3)(**given_to(name, text))
    assert scores.shape == (2, 96)
    assert len(scores[0].unique()) > 48  # not a constant
    assert torch.equal(scores, RelevanceScorer(width, name, seed=3)(**given_to(name, text)))
    if name not in ("random", "hybrid", "surprise_recency"):
        raw = SCORING_METHODS[name].raw(as_text(text["hidden_states"], **{key: text[key] for key in NEEDS.get(name, [])}))
        assert torch.equal(raw[0].argsort(stable=True), scores[0].argsort(stable=True))
    for signal in SCORING_METHODS[name].requires:
        scorer = RelevanceScorer(width, name)
        with pytest.raises(ValueError, match=f"{name}.* needs the signal {signal}"):
            scorer(text["hidden_states"])
        assert scorer.get_scoring_stats()["total_scored"] == 0


def test_random_follows_its_seed_and_no_signal(text):
    states = text["hidden_states"]
    first, second = (RelevanceScorer(states.shape[-1], "random", seed=seed)(states) for seed in (0, 1))
    assert not torch.equal(first, second)
    scorer = RelevanceScorer(states.shape[-1], "random", seed=0)
    assert torch.equal(scorer(states + 1), first)
    assert not torch.equal(scorer(states), first)  # each call draws anew


def test_hybrid_is_made_of_its_parts(text):
    width = text["hidden_states"].shape[-1]
    needed = given_to("hybrid", text)
    parts = [RelevanceScorer(width, name)(**needed) for name in ("attention_based", "variance_based", "surprise")]
    three = torch.stack(parts).mean(0)
    assert torch.equal(RelevanceScorer(width)(**needed).argsort(stable=True), three.argsort(stable=True))
    needed["nll"] = None
    two = torch.stack(parts[:2]).mean(0)
    assert torch.equal(RelevanceScorer(width)(**needed).argsort(stable=True), two.argsort(stable=True))


def test_a_threshold_keeps_the_same_share_over_methods_and_lengths(reference, stream):
    kept: dict[str, list[float]] = {name: [] for name in SCORING_METHODS}
    scorers = {name: RelevanceScorer(reference.model.config.hidden_size, name, reference_size=2048) for name in kept}
    for length, tokens, with_gradients in ((64, 4096, True), (512, 4096, True), (200, 4096, False), (2048, 12288, False)):
        pairs = stream[: len(stream) // (2 * length) * 2 * length].view(-1, 2, length)  # one text is seen, its neighbour measured
        pairs = pairs[torch.linspace(0, len(pairs) - 1, tokens // length).long()]
        seen, fresh = (signals_of(reference.model, pairs[:, part], with_gradients) for part in (0, 1))
        for name, scorer in scorers.items():
            if name == "gradient_based" and not with_gradients:
                continue
            scorer(**given_to(name, seen))
            kept[name].append(float((scorer(**given_to(name, fresh), update=False) >= 0.7).float().mean()))
    for name, shares in kept.items():
        assert all(abs(share - 0.3) < 0.08 for share in shares), (name, shares)
        assert abs(sum(shares) / len(shares) - 0.3) < 0.04, (name, shares)


def test_layers_lengths_and_signals_have_references_of_their_own(text):
    states = text["hidden_states"]
    scorer = RelevanceScorer(states.shape[-1], "variance_based", reference_size=100)
    scorer(states, layer_idx=1)
    low = scorer(states * 0.01, layer_idx=2)  # against layer 1 all of these would be 0
    assert 0.25 < (low >= 0.7).float().mean() < 0.35
    assert (scorer(states * 0.01, layer_idx=1) == 0).all()
    before = json.dumps(scorer.state_dict()["references"])
    scorer(states, layer_idx=1, update=False)
    assert json.dumps(scorer.state_dict()["references"]) == before
    for length in (1, 2, 5, 90):
        scorer(states[:, :length], layer_idx=1)
    assert len(scorer.get_scoring_stats()["references"]) == 2 + 3
    small = RelevanceScorer(states.shape[-1], "variance_based", max_references=2)
    for layer in range(5):
        small(states, layer_idx=layer)
    assert [key.split("layer ")[1][0] for key in small.get_scoring_stats()["references"]] == ["3", "4"]


def test_the_sample_is_uniform_and_bounded():
    ones, everything = torch.ones(1, 1, dtype=torch.bool), []
    for seed in range(40):
        sample = ScoreReference(50, seed)
        for start in range(0, 1000, 30):
            sample.add(torch.arange(start, min(start + 30, 1000)).float())
        assert sample.seen == 1000 and len(sample.values) == 50
        everything.append(sample.values)
    values = torch.cat(everything)
    assert values.mean() == pytest.approx(499.5, abs=4 * 288.7 / 2000**0.5)
    assert torch.histc(values, 4, 0, 1000).min() > 400  # of 500 expected
    assert ScoreReference(5).quantiles(torch.zeros(1, 1), ones) == 0.5
    tied = ScoreReference(4)
    tied.add(torch.tensor([1.0, 2.0, 2.0, 3.0]))
    assert tied.quantiles(torch.tensor([[2.0, 4.0, 0.0]]), ones.expand(1, 3)).tolist() == [[0.5, 1.0, 0.0]]


def test_saved_calibration_goes_on_bit_for_bit(text):
    width = text["hidden_states"].shape[-1]
    needed = given_to("hybrid", text)
    first = RelevanceScorer(width, reference_size=120, seed=5)
    first(**needed)
    saved = json.loads(json.dumps(first.state_dict()))
    second = RelevanceScorer(width, "random", reference_size=120)
    second.load_state_dict(saved)
    for _ in range(2):
        assert torch.equal(first(**needed), second(**needed))
    assert second.get_scoring_stats() == first.get_scoring_stats()
    smaller = RelevanceScorer(width, reference_size=60)
    smaller.load_state_dict(saved)
    assert {one["kept"] for one in smaller.get_scoring_stats()["references"].values()} == {60}
    key = next(iter(saved["references"]))
    for damage in (
        {"hidden_size": 7},
        {"scoring_method": "nothing"},
        {"references": {key: {"seen": 1, "values": [float("nan")], "priorities": [0.5]}}},
        {"references": {key: {"seen": 1, "values": [1.0], "priorities": []}}},
        {"references": {key: {"seen": 1}}},
        {"references": 3},
    ):
        before = second.get_scoring_stats()
        with pytest.raises(ValueError, match="hidden_size|scoring_method|reference|state"):
            second.load_state_dict(saved | damage)
        assert second.get_scoring_stats() == before


def test_bad_input_names_itself(text):
    states = text["hidden_states"]
    width = states.shape[-1]
    scorer = RelevanceScorer(width, "novelty")
    broken = states.clone()
    broken[1, 3, 2] = torch.nan
    for message, arguments, signals in (
        (r"hidden_states must be finite .* nan at \(1, 3, 2\)", (broken,), {}),
        (r"hidden_states must be floating point \[batch, tokens, ", (states[0],), {}),
        ("hidden_states must be floating", (states[..., :-1],), {}),
        ("hidden_states must be floating", (states.long(),), {}),
        (r"attention_mask must be \[batch, tokens\] = \[2, 96\], not \[2, 95\]", (states, torch.ones(2, 95)), {}),
        ("attention_mask must hold only 1", (states, torch.full((2, 96), -1e9)), {}),
        ("unknown signal 'nnl'; known are", (states,), {"nnl": text["nll"]}),
        (r"nll must be \[batch, tokens\] beside", (states,), {"nll": text["nll"][:, 1:]}),
        ("nll must be finite", (states,), {"nll": text["nll"] * torch.nan}),
        (r"gradients must be \[batch, tokens, hidden_size\]", (states,), {"gradients": states[:, :5]}),
        ("queries and keys must be given together", (states,), {"keys": text["keys"]}),
        ("keys must be", (states,), {"queries": text["queries"], "keys": text["keys"][:, :3]}),
        ("keys must be", (states,), {"queries": text["queries"], "keys": text["keys"][:, :, 1:]}),
        ("queries must be", (states,), {"queries": text["queries"][0], "keys": text["keys"]}),
        (r"memories must be \[memories, hidden_size\]", (states,), {"memories": states}),
        ("memories must be finite", (states,), {"memories": broken[1]}),
        ("signal nll must be a tensor, not list", (states,), {"nll": [1.0]}),
    ):
        with pytest.raises(ValueError, match=message):
            scorer(*arguments, **signals)
    assert scorer.get_scoring_stats()["total_scored"] == 0 and not scorer.get_scoring_stats()["references"]
    with pytest.raises(ValueError, match=r"scoring_method must be one of .* not 'hybird' \(did you mean 'hybrid'\?\)"):
        RelevanceScorer(width, "hybird")
    with pytest.raises(ValueError, match="not 'attention'"):
        scorer.update_scoring_method("attention")
    assert scorer.get_scoring_stats()["scoring_method"] == "novelty"
    for name in ("hidden_size", "reference_size", "max_references", "window", "block_bytes"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, not 0"):
            RelevanceScorer(**{"hidden_size": width, name: 0})
    with pytest.raises(TypeError, match="seed must be an integer, not 0.5"):
        RelevanceScorer(width, seed=0.5)


def test_a_broken_method_of_ones_own_is_found_out(text):
    states = text["hidden_states"]
    try:
        scoring_method("shape")(lambda text: text.states.sum((1, 2)))
        scoring_method("nan")(lambda text: text.mask * torch.nan)
        for name in ("shape", "nan"):
            with pytest.raises(ValueError, match=f"scoring method '{name}' must return finite scores of shape"):
                RelevanceScorer(states.shape[-1], name)(states)
        scoring_method("last", requires=("weights",))(lambda text: text.mask.cumsum(1) * text.signals["weights"])
        scores = RelevanceScorer(states.shape[-1], "last")(states, weights=torch.tensor(1.0))
        assert (scores.argmax(1) == 95).all()
    finally:
        for name in ("shape", "nan", "last"):
            SCORING_METHODS.pop(name, None)


def test_top_positions():
    scorer = RelevanceScorer(4)
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.0, 0.0, 0.3, 0.2]])
    assert scorer.get_top_k_positions(scores, 2).tolist() == [[1, 3], [2, 3]]
    assert scorer.get_top_k_positions(scores[0], 9).tolist() == [1, 3, 2, 0]
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1]])
    assert scorer.get_top_k_positions(scores, 3, mask).tolist() == [[2, 0, -1], [2, 3, 0]]
    for bad in ({"k": 0}, {"scores": scores * torch.nan}, {"scores": scores[None]}, {"attention_mask": mask[:1]}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))} must"):
            scorer.get_top_k_positions(**{"scores": scores, "k": 2} | bad)


def test_half_precision_one_token_and_empty_texts(text):
    states = text["hidden_states"]
    scorer = RelevanceScorer(states.shape[-1])
    assert scorer(states.bfloat16().requires_grad_()).requires_grad is False
    assert scorer(states[:, :1]).tolist() == [[0.5], [0.5]]
    none = scorer(states, torch.zeros(2, 96))
    assert none.abs().sum() == 0
    assert scorer(states[:0]).shape == (0, 96)
    assert scorer(states[:, :0]).shape == (2, 0)
    assert scorer.get_scoring_stats()["method_usage"] == {"hybrid": 5}
    assert scorer.get_scoring_stats()["total_scored"] == 2 * 96 + 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_an_accelerator(text):
    needed = given_to("hybrid", text)
    on_cpu = RelevanceScorer(text["hidden_states"].shape[-1])(**needed)
    scorer = RelevanceScorer(text["hidden_states"].shape[-1])
    scores = scorer(**{key: value.cuda() for key, value in needed.items()})
    assert scores.is_cuda
    assert (scores.cpu() - on_cpu).abs().max() < 0.03  # a rank or two
    again = RelevanceScorer(text["hidden_states"].shape[-1])
    again.load_state_dict(scorer.state_dict())
    assert torch.isfinite(again(**needed)).all()
