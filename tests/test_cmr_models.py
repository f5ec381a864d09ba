"""Models with memories: quantised weights, families that they are for, configurations, several rows, loading and saving."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from ai_sleep_constructs.cmr import (
    CMRTransformer,
    FullCMRModel,
    IntegratedCMRModel,
    LayeredMemoryBuffer,
    MemoryConfig,
    MistralCMRModel,
    RetrievalContext,
)
from ai_sleep_constructs.cmr.engine import MemoryEngine
from ai_sleep_constructs.cmr.logit_cache import contexts_of
from ai_sleep_constructs.cmr.retrieval import STRATEGIES, AdvancedMemoryRetriever
from ai_sleep_constructs.reference.corpus import load_corpus
from ai_sleep_constructs.reference.loading import load_model
from ai_sleep_constructs.sleep.state import LMModelState
from ai_sleep_constructs.sleep.strategies.base import SleepContext, run_transaction
from ai_sleep_constructs.sleep.strategies.semantic_consolidation import SemanticConsolidation

MEMORY = {"target_layers": [4, 5], "relevance_threshold": 0.0, "max_states_per_layer": 500, "places": "clamped", "logit_cache": 300}


@pytest.fixture(scope="module")
def reference():
    return load_model("reference", dtype=torch.float32)


@pytest.fixture
def ids(reference):
    text = "def area(width, height):\n    return width * height\n\n\nclass Shape:\n    def __init__(self, width):\n        self.width = width\n"
    return torch.tensor([reference.tokenizer(text)["input_ids"]])


@pytest.mark.parametrize("how", [{"dtype": torch.bfloat16}, {"quantization": "8bit"}, {"quantization": "4bit"}])
@torch.no_grad()
def test_memories_of_half_and_of_quantised_weights(ids, how):
    model = MistralCMRModel({"hidden_size": 256}, MEMORY, "reference", **how)
    model.remove_memory_hooks()
    bare = model(ids).logits
    model.register_memory_hooks()
    first = model(ids)
    assert torch.equal(first.logits, bare) and first.memory_info["stored"] == 2 * ids.shape[1]
    second = model(ids)
    assert not torch.equal(second.logits, bare) and bool(second.logits.isfinite().all())
    nll = [float(torch.nn.functional.cross_entropy(out[0, :-1].float(), ids[0, 1:])) for out in (bare, second.logits)]
    assert nll[1] < nll[0] - 0.2  # it has just read the same text
    model.remove_memory_hooks()
    assert torch.equal(model(ids).logits, bare)


@torch.no_grad()
def test_rows_of_a_batch_are_texts_of_their_own(reference, ids):
    model = IntegratedCMRModel(None, MEMORY, model=reference.model, tokenizer=reference.tokenizer)
    batch = torch.cat([ids, ids.flip(1)])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    model(batch, mask)
    length = ids.shape[1]
    assert [len(model.memory_buffer.retrieve_by_sequence(row)) for row in range(3)] == [2 * length, 2 * (length - 5), 0]
    output = model(ids, output_hidden_states=True, labels=ids)
    assert output.memory_info["sequence_ids"] == [2] and len(output.hidden_states) == 7 and output.loss > 0
    assert {"last_hidden_state", "captured_memory_states", "memory_stats", "performance_stats", "forward_time"} <= set(output)
    assert output.memory_stats["total_sequences"] == 3 and output.performance_stats["forward_passes"] == 2
    model.remove_memory_hooks()


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_what_does_not_fit_is_refused(reference):
    before = hooks(reference.model)
    for call, match in [
        (lambda: CMRTransformer({"hidden_size": 256}), "model_name"),
        (lambda: CMRTransformer(None, None, "reference", model=reference.model), "not both"),
        (lambda: CMRTransformer({"hidden_size": 768}, None, model=reference.model), "hidden_size is 768, but the model has 256"),
        (lambda: CMRTransformer({"hiden_size": 768}, None, model=reference.model), "did you mean hidden_size"),
        (lambda: CMRTransformer(None, {"target_layers": [6]}, model=reference.model), "layers must be ints in -6..5, got 6"),
        (lambda: CMRTransformer(None, {"scoring_method": "gradient_based"}, model=reference.model), "backward pass"),
        (lambda: MistralCMRModel(None, None, "reference-gpt2"), "for mistral"),
        (lambda: FullCMRModel(None, None, model=reference.model, retrieval_config={"context_heads": 7}), "context_heads=7"),
        (lambda: FullCMRModel(None, None, model=reference.model, retrieval_strategy="task_specific"), "task_type: .* needs one"),
        (lambda: FullCMRModel(None, None, model=reference.model, retrieval_strategy="task_specific", task_type="unheard"), "one of general.* got 'unheard'"),
        (lambda: FullCMRModel(None, None, model=reference.model, task_type="unheard", tasks={"mine": "hierarchical"}), "general, mine"),
        (lambda: FullCMRModel(None, None, model=reference.model, tasks={"mine": {"luck": 1.0}}), "luck"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
    model = IntegratedCMRModel(None, None, model=reference.model)
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(torch.tensor([[1, 2]]), num_beams=2)
    with pytest.raises(ValueError, match="has memories already"):
        IntegratedCMRModel(None, {"target_layers": [5]}, model=reference.model)
    model.remove_memory_hooks()
    assert hooks(reference.model) == before


@torch.no_grad()
def test_a_sliding_window_of_the_model_stays_what_it_is():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128, sliding_window=8, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = MistralCMRModel(None, {"target_layers": [1], "relevance_threshold": 0.0}, model=MistralForCausalLM(config).eval())
    text = torch.randint(1, 64, (1, 40))
    model.remove_memory_hooks()
    bare, written = model(text).logits, model.generate(text, max_new_tokens=6, do_sample=False)
    model.register_memory_hooks()
    assert torch.equal(model(text).logits, bare)
    model.memory_buffer.clear_all()
    assert torch.equal(model.generate(text, max_new_tokens=6, do_sample=False), written)
    assert not torch.equal(model(text).logits, bare)
    model.remove_memory_hooks()


@torch.no_grad()
def test_sleep_consolidates_the_memories(reference, ids):
    model = IntegratedCMRModel(None, {**MEMORY, "target_layers": [5], "logit_cache": 0}, model=reference.model, tokenizer=reference.tokenizer)
    for _ in range(4):
        model(ids)
    before = len(model.memory_buffer)
    night = SleepContext(LMModelState("m"), stores={"cmr": model.memory_buffer})
    report = run_transaction(SemanticConsolidation(memory_budget=0.3), night)
    assert report.status == "committed" and before == 4 * ids.shape[1] and len(model.memory_buffer) <= 0.3 * before + 1
    assert model(ids).memory_info["recalled"][5] > 0
    model.remove_memory_hooks()


def test_a_retrieval_stays_within_its_budget_and_its_layer():
    buffer = LayeredMemoryBuffer(50, 100)
    generator = torch.Generator().manual_seed(0)
    for layer in (0, 1):
        buffer.store_states(
            torch.randn(50, 16, generator=generator), layer, torch.arange(50), torch.rand(50, generator=generator), layer)
    retriever = AdvancedMemoryRetriever(16, buffer, {"similarity_threshold": -1.0, "neighbours_before": 1, "neighbours_after": 3})
    context = RetrievalContext(0, 1, torch.randn(2, 3, 16), retrieval_budget=7)
    for strategy in ("semantic_similarity", "contextual_relevance", "multi_criteria", "hierarchical", "task_specific", "hybrid_ensemble"):
        found = retriever.retrieve_memories(context, strategy)
        assert len(found) == 7 and {e.layer_idx for e in found} == {1} and len({e.position_idx for e in found}) == 7
    assert retriever.retrieve_memories(RetrievalContext(0, 3, torch.randn(16), retrieval_budget=7)) == []


@torch.no_grad()
def test_what_the_logit_cache_remembers_does_not_depend_on_the_pieces(reference, ids):
    padded, mask = torch.cat([ids, ids.flip(1)]), torch.ones(2, ids.shape[1], dtype=torch.int64)
    mask[1, :5] = 0
    found = []
    for sizes in ([ids.shape[1]], [12, 1, 1, ids.shape[1] - 14]):
        engine = MemoryEngine(reference.model, MemoryConfig(target_layers=[2], relevance_threshold=1.0, logit_cache=200))
        engine.attach()
        try:
            past, read = None, 0
            for piece in padded.split(sizes, dim=1):
                read += piece.shape[1]
                places = (mask.cumsum(1) - 1).clamp_min(0)[:, read - piece.shape[1] : read]
                past = reference.model(
                    input_ids=piece, attention_mask=mask[:, :read], position_ids=places, past_key_values=past, use_cache=True).past_key_values
        finally:
            engine.detach()
        rows = engine.cache.buffer.layers[0]
        slots = engine.cache.buffer.slots(0)
        order = (rows["sequence"][slots] * 1000 + rows["position"][slots]).argsort()
        found.append([rows[name][slots][order] for name in ("position", "field.token", "field.context", "relevance")])
    whole, pieces = found
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], pieces[:3], strict=True))
    assert torch.allclose(whole[3], pieces[3], atol=1e-5) and float(whole[3].std()) > 0.1
    texts = [ids[0], ids.flip(1)[0, 5:]]
    assert torch.equal(whole[2].long(), torch.cat([contexts_of(text)[:-1] for text in texts]))
    assert torch.equal(whole[1], torch.cat([text[1:] for text in texts]))


@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_a_strategy_bears_on_the_tokens_within_a_pass(reference, ids, strategy):
    model = FullCMRModel(None, {**MEMORY, "target_layers": [5], "retrieval_budget": 24, "logit_cache": 0}, model=reference.model,
                         tokenizer=reference.tokenizer, retrieval_strategy=strategy, task_type="general")
    model.remove_memory_hooks()
    bare = model(ids).logits
    model.register_memory_hooks()
    model(ids)
    output = model(ids)
    model.remove_memory_hooks()
    moved = (output.logits != bare).any(-1)[0]
    assert 0 < output.memory_info["recalled"][5] <= 24
    assert float(moved[:-1].float().mean()) > 0.5 and not bool(moved[0])  # the first that asks stands further on


@torch.no_grad()
def test_a_strategy_spends_nothing_on_what_the_window_holds(reference):
    text = next(d.text for d in load_corpus("python", "guard").documents if len(d.text) > 4000)
    ids = torch.tensor([reference.tokenizer(text)["input_ids"][:700]])
    model = FullCMRModel(None, {**MEMORY, "target_layers": [5], "max_states_per_layer": 1000, "retrieval_budget": 32, "window": 256, "logit_cache": 0,
                                "neighbours": 0}, model=reference.model, retrieval_strategy="task_specific", task_type="newest",
                         tasks={"newest": {"recency": 1.0}})
    held = model(ids[:, :600], use_cache=True).past_key_values
    model(ids[:, 600:], past_key_values=held)
    model.remove_memory_hooks()
    slots = model.engine.recall.recalled[5][0]
    places = model.memory_buffer.gather(5, slots[slots >= 0]).positions.sort().values
    # every third or fourth token asks for the newest memory that it may see: the one 256 tokens before it
    assert len(places) >= 20 and int(places.max()) == 699 - 256 and int(places.min()) > 600 - 256


@torch.no_grad()
def test_questions_find_memories_of_text_by_the_default_threshold(reference):
    documents = [d.text for d in load_corpus("python", "guard").documents if len(d.text) > 4000][:4]
    questions = ("def read(self, path):\n        return", "for name in self._names:", "raise ValueError", "class Reader(object):")
    elsewhere = torch.randint(len(reference.tokenizer), (12,), generator=torch.Generator().manual_seed(1))
    for memory in ({"target_layers": [5]}, {"target_layers": [5], "scoring_method": "random"}, {"target_layers": [3, 4, 5], "relevance_threshold": 0.0, "max_states_per_layer": 800, "buffer_size": 10_000}):
        model = FullCMRModel(None, memory, model=reference.model, tokenizer=reference.tokenizer)
        assert model.retriever.config["similarity_threshold"] == 0.7
        for text in documents:
            model(torch.tensor([reference.tokenizer(text)["input_ids"][:800]]))
        model.remove_memory_hooks()
        for layer in memory["target_layers"]:
            found = [len(model.retrieve(question, 10, layer=layer)) for question in questions]
            print(len(model.memory_buffer), layer, found)
            least = 3 if "max_states_per_layer" not in memory and "scoring_method" not in memory else 4  # few states are attended to most
            assert sum(number > 0 for number in found) >= least and model.retrieve(elsewhere, 10, layer=layer) == []


@torch.no_grad()
def test_tasks_outlive_a_calibration(reference):
    texts = [d.text[:2500] for d in load_corpus("python", "guard").documents if len(d.text) > 4000][:2]
    model = FullCMRModel(None, {**MEMORY, "target_layers": [5], "logit_cache": 0}, model=reference.model, tokenizer=reference.tokenizer,
                         retrieval_strategy="task_specific", task_type="mine", tasks={"mine": "hierarchical"})
    model.retriever.register_task("later", {"recency": 1.0})
    model.calibrate(texts)
    model.remove_memory_hooks()
    assert model.retriever.memory_buffer is model.memory_buffer and set(model.retriever.tasks) == {"general", "mine", "later"}


@torch.no_grad()
def test_all_of_a_full_model_is_saved(reference, ids, tmp_path):
    memory = {**MEMORY, "relevance_threshold": 0.4, "scoring_method": "hybrid", "logit_cache": 0}
    model = FullCMRModel(
        None, memory, model=reference.model, tokenizer=reference.tokenizer, retrieval_strategy="task_specific", task_type="names",
        retrieval_config={"similarity_threshold": 0.1, "neighbours_after": 2}, tasks={"names": {"similarity": 1.0, "recency": 0.5}},
    )
    model.retriever.register_task("plain", "semantic_similarity")
    for text in (ids, ids.flip(1)):
        model(text)
    loaded = FullCMRModel.from_pretrained(model.save_pretrained(tmp_path / "saved"), dtype=torch.float32)
    assert (loaded.retrieval_strategy, loaded.task_type, loaded.retriever.config) == ("task_specific", "names", model.retriever.config)
    found = []
    for one in (model, loaded):
        asked = [one.retrieve("return width", 9, "task_specific", task_type=task) for task in ("names", "plain")]
        found.append([[(e.sequence_id, e.position_idx) for e in entries] for entries in asked])
        one(ids.roll(7, 1))
        new = one.memory_buffer.retrieve_by_sequence(2)
        found[-1].append([(e.layer_idx, e.position_idx, e.relevance_score) for e in new])
    assert found[0] == found[1] and all(found[0]) and found[0][0] != found[0][1]
    model.remove_memory_hooks()
