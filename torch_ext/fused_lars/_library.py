"""Loads libfused_lars.so, which registers torch.ops.fused_lars and torch.classes.fused_lars."""

import re
from pathlib import Path

import torch

_LIB = Path(__file__).parent / "lib"
_BUILD = (
    "Build it for this torch, from a checkout: `pip install .`, or `make build` to use it in place "
    "(docs/install.md has what that needs)"
)


def _library() -> Path:
    """The library for this torch, as fused_lars-config.cmake chooses it.

    A C++ library works with one series of torch only, such as 2.14. With another it may load and fail later.
    """
    series = ".".join(torch.__version__.split(".")[:2])
    major = int((torch.version.cuda or "0").split(".")[0])
    best = None
    for file in sorted(_LIB.glob(f"torch{series}-*/libfused_lars.so")):  # cpu, cuda12, cuda13
        kernels = re.fullmatch(r".*-cuda(\d+)", file.parent.name)
        if kernels is None or int(kernels[1]) <= major:
            best = file
    if best is None:
        there = ", ".join(sorted(file.parent.name for file in _LIB.glob("torch*/libfused_lars.so")))
        raise ImportError(
            f"fused_lars has no library for torch {torch.__version__} (CUDA {torch.version.cuda}). "
            f"{_LIB} has {there or 'none'}. {_BUILD}"
        )
    return best


def _load() -> None:
    library = _library()
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"{library} does not load with torch {torch.__version__} (CUDA {torch.version.cuda}): {error}. "
            f"{_BUILD}"
        ) from error


_load()
_config = torch.ops.fused_lars.config()

__version__: str = _config["version"]

# The CMAKE_PREFIX_PATH for find_package(fused_lars), like torch.utils.cmake_prefix_path for Torch.
cmake_prefix_path: str = str(Path(__file__).parent / "share" / "cmake")


class _Lines(str):
    """A string that a Python prompt shows as print() does."""

    def __repr__(self) -> str:
        return str(self)


def show_config() -> str:
    """Describes what the library was built from and what it uses on this machine.

    Returns:
        str: lines with the version, the torch and the CUDA (with its architectures) that the library was
        built with, and the instruction set and the number of threads of the CPU step. A Python prompt shows
        them as ``print`` does.
    """
    return _Lines(
        f"fused_lars {__version__}\n"
        f"torch: {_config['torch']}\n"
        f"CUDA: {_config['cuda']}\n"
        f"CPU: {_config['simd']}, {torch.get_num_threads()} threads"
    )
