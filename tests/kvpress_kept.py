"""Which cache entries the presses of kvpress keep on the reference checkpoint, as JSON.

Run by hand in an environment of its own, because kvpress 0.5.5 needs transformers below 5.3:

    python -m venv kvpress-env
    kvpress-env/bin/pip install torch==2.13.0 transformers==4.57.1 kvpress==0.5.5
    kvpress-env/bin/python tests/kvpress_kept.py

It writes tests/data/kvpress_kept.json: the tokens of a short text, and for each press and compression ratio the kept
entries as a nested list [layer][key/value group][entry], ascending. `test_kv_cache.py` compares them with this package's.
The entries are recovered from the compressed cache itself, by looking up each kept key among those of a whole cache.
"""

import json
from pathlib import Path

import torch

HERE = Path(__file__).parent
CHECKPOINT = HERE.parent / "ai_sleep_constructs" / "reference" / "checkpoints" / "mistral"
TOKENS, WINDOW, RATIOS = 160, 16, (0.5, 0.8)


def main() -> None:
    """Prefill with each press and write the kept entries."""
    import kvpress
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(CHECKPOINT / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    lines = (f"def area_{i}(width, height={i * 37 % 91}):\n    return width * height + {i * i}\n\n\n" for i in range(40))
    ids = tokenizer("import math\n\n\n" + "".join(lines), add_special_tokens=False)["input_ids"][:TOKENS]
    whole = prefill(model, ids)
    presses = {
        "KeyDiffPress": lambda ratio: kvpress.KeyDiffPress(ratio),
        "KnormPress": lambda ratio: kvpress.KnormPress(ratio),
        "StreamingLLMPress": lambda ratio: kvpress.StreamingLLMPress(ratio, n_sink=4),
        "SnapKVPress": lambda ratio: kvpress.SnapKVPress(ratio, window_size=WINDOW, kernel_size=5),
    }
    kept: dict[str, dict[str, list[list[list[int]]]]] = {}
    for name, make in presses.items():
        for ratio in RATIOS:
            with make(ratio)(model):
                short = prefill(model, ids)
            kept.setdefault(name, {})[str(ratio)] = [find(a, b) for a, b in zip(whole, short, strict=True)]
    record = {"kvpress": "0.5.5", "transformers": transformers.__version__, "torch": torch.__version__, "window": WINDOW, "ids": ids, "kept": kept}
    target = HERE / "data" / "kvpress_kept.json"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".tmp")
    partial.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    partial.replace(target)
    print({name: {ratio: len(layers[0][0]) for ratio, layers in by.items()} for name, by in kept.items()})


@torch.no_grad()
def prefill(model: torch.nn.Module, ids: list[int]) -> list[torch.Tensor]:
    """The keys of each layer after reading `ids`, each of shape [groups, entries, channels]."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return [layer.keys[0] for layer in cache.layers]


def find(whole: torch.Tensor, short: torch.Tensor) -> list[list[int]]:
    """Where the entries of `short` are in `whole`, for each group, ascending."""
    same = (short[:, :, None] == whole[:, None]).all(-1)
    if not (same.sum(-1) == 1).all():
        raise RuntimeError("a kept key is not exactly one of the whole cache's keys")
    return same.int().argmax(-1).sort(-1).values.tolist()


if __name__ == "__main__":
    main()
