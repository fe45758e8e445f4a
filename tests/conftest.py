import pytest
import torch
from hypothesis import settings

# The same examples in every run, and no clock: what fails here fails everywhere.
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
    """Every device; ``-k cuda`` selects that half of the suite."""
    return request.param


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
