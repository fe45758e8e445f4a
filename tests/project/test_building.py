"""The build's errors when it cannot build."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from paths import ROOT


def test_old_setuptools():
    """Older versions had no bdist_wheel, and pip checks build requirements only in isolated builds."""
    pytest.importorskip("setuptools", reason="setup.py needs setuptools")
    program = f"""
import runpy, sys
sys.modules["setuptools.command.bdist_wheel"] = None
runpy.run_path({str(ROOT / "setup.py")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "fused_lars is built with setuptools>=70.1, and" in done.stderr
    assert "pip install --upgrade 'setuptools>=70.1'" in done.stderr


def test_types_are_part_of_the_package(tmp_path):
    """Without py.typed, type checkers treat an installed package as Any."""
    pytest.importorskip("setuptools", "70.1", reason="setup.py needs setuptools")
    command = [sys.executable, ROOT / "setup.py", "--quiet", "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "fused_lars" / "py.typed").exists()


def test_old_torch(tmp_path):
    """pip and make show it too, because both call CMake."""
    package = tmp_path / "torch" / "share" / "cmake" / "Torch"
    package.mkdir(parents=True)
    (package / "TorchConfig.cmake").touch()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.8.0+cu128'\n")
    cmake = shutil.which("cmake") or pathlib.Path(sys.executable).parent / "cmake"
    done = subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path / "build", f"-DTorch_DIR={package}"],
        env={**os.environ, "FUSED_LARS_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    message = " ".join(done.stderr.split())
    assert f"torch 2.8.0+cu128 in {tmp_path / 'torch'}; allowed: 2.9 and newer" in message
