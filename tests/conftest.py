import pytest
import torch
from hypothesis import settings

# Every run tries the same examples, and no clock decides. So what fails here fails everywhere.
settings.register_profile("fused_lars", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("fused_lars")

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")
    ),
]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """Every device. ``-k cuda`` selects the tests on CUDA."""
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
