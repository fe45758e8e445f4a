"""Finds the programs of tests/programs, which CMake builds with -DFUSED_LARS_TESTS=ON."""

import os
import subprocess
from pathlib import Path

from paths import ROOT

BUILD = Path(os.environ.get("FUSED_LARS_BUILD", ROOT / "build"))


def path(name: str) -> Path:
    program = BUILD / "tests" / name
    assert program.is_file(), f"{program} is missing; build it: make build CMAKE_FLAGS=-DFUSED_LARS_TESTS=ON"
    return program


def run(name: str, *arguments) -> str:
    """Runs the program, which must exit with 0, and returns its output."""
    done = subprocess.run([path(name), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name} failed ({done.returncode}):\n{done.stdout}{done.stderr}"
    return done.stdout


def libraries(program: Path) -> set[str]:
    """Names of the shared libraries that a program loads."""
    lines = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[0] for line in lines}
