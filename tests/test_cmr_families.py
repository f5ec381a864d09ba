"""Memories are exact in every family that is accepted, and any other is refused with its reason."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ai_sleep_constructs.cmr.capture import StateCapture
from ai_sleep_constructs.cmr.layers import FAMILIES, memory_layers
from ai_sleep_constructs.cmr.recall import BufferRecall
from ai_sleep_constructs.cmr.reweaving import Reweaver
from ai_sleep_constructs.cmr.tensor_buffer import TensorBuffer

SMALL = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3,
    "max_position_embeddings": 256, "head_dim": 8, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "sliding_window": 1000, "use_sliding_window": False,
}


def made(family, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **more}), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # gains and biases that are all alike would hide what is left out
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt2"])
@torch.no_grad()
def test_all_memories_are_the_whole_context(family):
    model = made(family, **({"no_rope_layer_interval": 2} if family == "smollm3" else {}))
    text, old = torch.randint(1, 128, (1, 90)), 60
    layers, buffer = memory_layers(model), TensorBuffer(100, 1000)
    assert {layer.rotary is None for layer in layers} == ({True, False} if family == "smollm3" else {False})

    def keep(index, states):
        buffer.store_states(states[0], index, torch.arange(old), torch.full((old,), 0.5))

    with StateCapture(model, keep):
        model(input_ids=text[:, :old])
    new = torch.arange(old, 90)[None]
    whole = model(input_ids=text).logits[:, old:]
    alone = model(input_ids=text[:, old:], position_ids=new).logits
    with Reweaver(model, BufferRecall(buffer, budget=None, window=1, places="true")):
        woven = model(input_ids=text[:, old:], position_ids=new).logits
    assert float((alone - whole).abs().max()) > 0.1
    assert float((woven - whole).abs().max()) < 1e-4


@pytest.mark.parametrize(("family", "why"), [
    ("gemma2", "caps its attention logits"), ("gpt_oss", "has attention sinks"), ("stablelm", "rotates part of a head"),
    ("gemma3_text", "supported are .*gpt2.*mistral"), ("olmo2", "not been compared"), ("olmoe", "not been compared"),
    ("hunyuan_v1_dense", "not been compared"), ("llama4_text", "not been compared"),
])
def test_what_would_be_passed_over_is_refused(family, why):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL))
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(ValueError, match=rf"model: memories are not supported for '{family}': .*{why}"):
        memory_layers(model)
    with pytest.raises(ValueError, match="memories are not supported"):
        StateCapture(model, print)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
