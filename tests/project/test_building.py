"""The build's errors when it cannot build."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

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


# In pip's isolated builds, torch cannot be imported, and sysconfig knows where it would be.
ISOLATED = f"""
import importlib.util, runpy, sys, sysconfig
find_spec, get_path = importlib.util.find_spec, sysconfig.get_path
importlib.util.find_spec = lambda name: None if name == "torch" else find_spec(name)
sysconfig.get_path = lambda *arguments: SITE or get_path(*arguments)
sys.argv = ["setup.py", *ARGUMENTS]
runpy.run_path({str(ROOT / "setup.py")!r})
"""


def run_isolated(*arguments, site=None):
    program = ISOLATED.replace("SITE", repr(site)).replace("ARGUMENTS", repr([*map(str, arguments)]))
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_an_isolated_build_is_against_the_torch_that_is_installed(tmp_path):
    pytest.importorskip("setuptools", "70.1", reason="setup.py needs setuptools")
    done = run_isolated("--quiet", "egg_info", "--egg-base", tmp_path)
    assert done.returncode == 0, done.stderr
    series = ".".join(torch.__version__.split(".")[:2])
    assert (tmp_path / "fused_lars.egg-info" / "requires.txt").read_text() == f"torch=={series}.*\n"


def test_a_wheel_for_several_series_takes_a_newer_torch_too(tmp_path):
    """pip would replace it by an older one. Without a library for it, the import says so."""
    pytest.importorskip("setuptools", "70.1", reason="setup.py needs setuptools")
    command = [sys.executable, ROOT / "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path]
    environment = {**os.environ, "FUSED_LARS_TORCHES": f"{tmp_path}/2.9 {tmp_path}/2.14"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "fused_lars.egg-info" / "requires.txt").read_text() == "torch>=2.9\n"


def test_a_build_without_torch_says_what_to_do(tmp_path):
    pytest.importorskip("setuptools", "70.1", reason="setup.py needs setuptools")
    done = run_isolated("--quiet", "build_ext", "--build-lib", tmp_path, site=str(tmp_path))
    assert done.returncode == 1
    assert f"against the torch that is installed, and {sys.executable} has none. If torch is" in done.stderr
    assert "add --no-build-isolation. If it is not, install torch first" in done.stderr


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
