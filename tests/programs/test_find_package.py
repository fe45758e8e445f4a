"""find_package(fused_lars) from an installed wheel and from a CMake install, in a separate project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cpp_program
import fused_lars
from paths import ROOT

CONSUMER = ROOT / "tests" / "programs" / "consumer"
# The CMake package of a CUDA build of torch asks for these, and fails without a toolkit.
NOT_NEEDED = ("Torch", "Caffe2", "CUDA", "CUDAToolkit", "Python3")


STEP = """
import os, fused_lars, torch
assert os.path.dirname(fused_lars.__file__).startswith(os.environ["PYTHONPATH"]), fused_lars.__file__
weight = torch.nn.Parameter(torch.ones(2))
weight.grad = torch.ones(2)
fused_lars.LARS([weight], fused=True).step()
assert weight[0] < 1
"""


def run(*command, cwd=None, **environment) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def tool(name: str) -> str:
    return shutil.which(name) or str(Path(sys.executable).parent / name)


@pytest.fixture
def cmake_install(tmp_path) -> list[Path]:
    run(tool("cmake"), "--install", cpp_program.BUILD, "--prefix", tmp_path / "prefix")
    # Nothing in the package tells where torch is, so CMake must be told, as by any user of LibTorch.
    return [tmp_path / "prefix", Path(torch.utils.cmake_prefix_path)]


@pytest.fixture
def wheel(tmp_path) -> list[Path]:
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path),
        ROOT,
        TORCH_CUDA_ARCH_LIST="9.0+PTX",
    )
    (file,) = tmp_path.glob("fused_lars-*-py3-none-*.whl")
    site_packages = tmp_path / "site-packages"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site_packages, file)
    # In site-packages, torch and the packages that pip installed for it are beside the library.
    beside = Path(torch.__file__).parents[1]
    for name in ("torch", "nvidia"):
        if (beside / name).exists():
            (site_packages / name).symlink_to(beside / name)
    run(sys.executable, "-c", STEP, cwd=tmp_path, PYTHONPATH=str(site_packages))
    return [site_packages / "fused_lars" / "share" / "cmake"]


@pytest.mark.parametrize("installed", ["cmake_install", "wheel"])
def test_a_project_outside_of_the_tree(installed, request, tmp_path):
    prefixes = request.getfixturevalue(installed)
    source = shutil.copytree(CONSUMER, tmp_path / "consumer")
    build = tmp_path / "build"
    # Only what any machine with a compiler has. Its Python has no torch.
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "", "CUDA_HOME": "", "CUDACXX": ""}
    run(
        *(tool("cmake"), "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={';'.join(map(str, prefixes))}"),
        *(f"-DCMAKE_DISABLE_FIND_PACKAGE_{name}=ON" for name in NOT_NEEDED),
        **environment,
    )
    run(tool("cmake"), "--build", build, **environment)
    printed = run(build / "consumer", **environment)
    assert "Lars(lr=1, momentum=0.9, weight_decay=0, trust_coefficient=0.01, states=1)" in printed
    assert "Invalid momentum value: 2; allowed: >= 0 and < 1" in printed
    libraries = cpp_program.libraries(build / "consumer")
    assert "libfused_lars.so" in libraries
    assert not [name for name in libraries if "python" in name]


def test_a_project_that_adds_the_sources(tmp_path):
    """It is configured but not built, because a build would compile the whole library again."""
    run(
        *(tool("cmake"), "-S", CONSUMER, "-B", tmp_path, f"-DFUSED_LARS_SOURCE={ROOT}"),
        *("-DFUSED_LARS_CUDA=0", f"-DPython3_EXECUTABLE={sys.executable}"),
    )
    # The project's own settings are left to it.
    assert re.search("^CMAKE_BUILD_TYPE:.*=$", (tmp_path / "CMakeCache.txt").read_text(), re.MULTILINE)


LIBRARY = Path(fused_lars.__file__).parent / "lib" / "libfused_lars.so"


def test_the_library_shows_its_api_only():
    """It exports only functions and data that a header declares. The rest is inlined from torch."""
    headers = "".join(file.read_text() for file in (ROOT / "csrc" / "include").rglob("*.h"))
    names = set(re.findall(r"\w+", headers))
    symbols = re.findall(r"^\w+ ([A-TX-Z]) (.*)$", run("nm", "-DC", "--defined-only", LIBRARY), re.MULTILINE)
    assert len(symbols) > 20
    for _, symbol in symbols:
        found = re.match(r"(?:non-virtual thunk to )?fused_lars::([\w:]+)", symbol)
        assert found, symbol
        assert set(re.findall(r"\w+", found[1])) <= names, symbol
    assert not re.search("fused_lars.*anonymous namespace", run("nm", "-DC", "--defined-only", LIBRARY))


def test_errors_do_not_say_where_the_library_was_built():
    text = LIBRARY.read_bytes()
    assert b"csrc/checks.cpp" in text
    for folder in (ROOT / "csrc", Path(torch.__file__).parent / "include"):
        for path in (folder, folder.resolve()):
            assert str(path).encode() not in text
