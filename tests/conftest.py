"""What several test files begin with."""

import pytest


@pytest.fixture
def llama():
    import torch

    from families import FAMILIES

    torch.manual_seed(0)
    return FAMILIES["llama"]().eval()
