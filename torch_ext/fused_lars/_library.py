"""Loads libfused_lars.so, which registers torch.ops.fused_lars and torch.classes.fused_lars."""

from pathlib import Path

import torch

_PATH = Path(__file__).parent / "lib" / "libfused_lars.so"

if not _PATH.exists():
    raise ImportError(
        f"{_PATH} is missing: the package was not built. Run `make build` in a checkout, "
        "or `pip install --no-build-isolation .`"
    )
try:
    torch.ops.load_library(_PATH)
except OSError as error:
    raise ImportError(
        f"{_PATH} does not load beside torch {torch.__version__}; it was probably built for another version. "
        "Build again: `pip install --no-build-isolation --force-reinstall --no-deps .`"
    ) from error
