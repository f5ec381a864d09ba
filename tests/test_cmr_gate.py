"""The learned gate: wherever its samples, its weights and the memories are, and whatever mode it is trained in."""

import pytest
import torch
from families import FAMILIES

from ai_sleep_constructs.cmr.calibration import fit_gate
from ai_sleep_constructs.cmr.gate import FEATURES, LearnedGate
from ai_sleep_constructs.cmr.logit_cache import LogitCache


def samples(tokens=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(tokens, len(FEATURES), generator=g), torch.rand(tokens, generator=g), torch.rand(tokens, generator=g)) for _ in range(2)]


class Elsewhere(torch.Tensor):
    """Numbers that, as those on a GPU, can be calculated with, but only reach numpy by way of `cpu`."""

    def numpy(self, *args, **options):
        raise TypeError("can't convert a tensor of another device to numpy")

    def cpu(self, *args, **options):
        return self.as_subclass(torch.Tensor)


def test_samples_of_another_device_teach_the_same():
    gates = [LearnedGate(), LearnedGate()]
    nats = gates[0].fit(samples(), steps=20)
    assert gates[1].fit([tuple(x.as_subclass(Elsewhere) for x in part) for part in samples()], steps=20) == nats
    assert gates[0].provenance == gates[1].provenance


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_gate_learns_in_any_mode(mode, tmp_path):
    outside = LearnedGate()
    nats = outside.fit(samples(), steps=20)
    inside = LearnedGate()
    with mode():
        assert inside.fit(samples(), steps=20) == nats
    torch.manual_seed(0)
    model = FAMILIES["mistral"]().eval()
    with mode():
        gate = fit_gate(model, [torch.randint(1, 128, (300,))], memories=(64,), window=64)
        gate.save(tmp_path / "gate.safetensors")
    assert gate.provenance["tokens"] > 100 and LearnedGate.load(tmp_path / "gate.safetensors").provenance == gate.provenance
    gate.fit(samples(), steps=2)


def test_the_gate_is_where_the_memories_are():
    cache = LogitCache(8, 10, gate=LearnedGate(), device="meta")
    assert all(p.is_meta for p in cache.gate.parameters()) and cache.gate.mean.is_meta
    cache.gate = LearnedGate()
    assert cache.gate.mean.is_meta
    cache.gate = by_hand = lambda votes, logp: torch.zeros(len(logp))
    assert cache.gate is by_hand
