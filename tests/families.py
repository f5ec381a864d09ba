"""Small models of five families, for tests that must hold for each of them."""

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def families(**more):
    """A function that makes a model, by family: 3 layers of 6 heads, width 48, 128 tokens; `more` goes to every configuration."""
    gpt2 = {"vocab_size": 128, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 256, **ENDS, **more}
    small = {
        "vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
        "max_position_embeddings": 256, **ENDS, **more,
    }
    return {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=6)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**small, num_key_value_heads=3, sliding_window=None, head_dim=8)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**small, num_key_value_heads=2)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**small, num_key_value_heads=2, head_dim=8)),
    }


FAMILIES = families()
