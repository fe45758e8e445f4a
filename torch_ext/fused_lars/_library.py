"""Loads libfused_lars.so, which registers torch.ops.fused_lars and torch.classes.fused_lars."""

from pathlib import Path

import torch

_LIB = Path(__file__).parent / "lib"
_BUILD = "Build it with this torch: `pip install .`, in a checkout `make build`"


def _load() -> None:
    library = _LIB / "libfused_lars.so"
    if not library.is_file():
        raise ImportError(f"{library} is missing: the C++ part is not built. {_BUILD}")
    # A C++ library works with one torch series only, such as 2.14. With another it may load and fail later.
    built_for = (_LIB / "torch-version.txt").read_text().strip()
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"fused_lars was built for torch {built_for}, but this is torch {torch.__version__}. {_BUILD}"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"{library}, built for torch {built_for}, does not load with torch {torch.__version__} (CUDA "
            f"{torch.version.cuda}): {error}. {_BUILD}"
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
