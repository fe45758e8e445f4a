"""Describes the machine in a GPU report: the GPU, its driver and clocks, versions."""

import pathlib
import subprocess
import sys
from datetime import datetime, timezone

import torch

import fused_lars


def output_of(*command) -> str | None:
    """Returns what a program prints, or None if it is missing or fails."""
    folder = pathlib.Path(__file__).parent  # in the checkout
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def driver_and_clocks() -> dict[str, str] | None:
    """Returns what nvidia-smi says, or None without it."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw")
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    line = output_of("nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return dict(zip(fields, map(str.strip, line.split(",")))) if line else None


def machine() -> dict:
    gpu = torch.cuda.get_device_properties(0)
    return {
        "GPU": gpu.name,
        "compute capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "L2 bytes": gpu.L2_cache_size,
        "memory bytes": gpu.total_memory,
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "Python": sys.version.split()[0],
        "fused_lars": fused_lars.show_config(),
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
