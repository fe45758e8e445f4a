"""find_package(fused_lars) from an installed wheel and a CMake install, by a project outside of the tree."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import cpp_program

ROOT = Path(__file__).parent.parent
# Packages that the CMake package of a CUDA build of torch asks for, and without a toolkit does not find.
NOT_NEEDED = ("Torch", "Caffe2", "CUDA", "CUDAToolkit", "Python3")


def run(*command, **environment) -> str:
    done = subprocess.run(
        [str(part) for part in command],
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
    # Nothing of the package tells where torch is, so CMake has to be told, as by any user of LibTorch.
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
    zipfile.ZipFile(file).extractall(site_packages)
    # In site-packages torch is beside it, and what pip installed for torch.
    beside = Path(torch.__file__).parents[1]
    for name in ("torch", "nvidia"):
        if (beside / name).exists():
            (site_packages / name).symlink_to(beside / name)
    return [site_packages / "fused_lars" / "share" / "cmake"]


@pytest.mark.parametrize("installed", ["cmake_install", "wheel"])
def test_a_project_outside_of_the_tree(installed, request, tmp_path):
    prefixes = request.getfixturevalue(installed)
    source = shutil.copytree(ROOT / "tests" / "consumer", tmp_path / "consumer")
    build = tmp_path / "build"
    # Only what any machine with a compiler has; the Python there knows no torch.
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
