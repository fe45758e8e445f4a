"""find_package(fused_lars) from an installed package and from a CMake install, in a separate project."""

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
import python_program
from paths import PACKAGE, ROOT

CONSUMER = ROOT / "tests" / "programs" / "consumer"
# The CMake package of a CUDA build of torch asks for these, and fails without a toolkit.
NOT_NEEDED = ("Torch", "Caffe2", "CUDA", "CUDAToolkit", "Python3")


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
def installed_package() -> list[Path]:
    package = Path(fused_lars.cmake_prefix_path)
    beside = Path(torch.__file__).parent == PACKAGE / "torch"  # as in site-packages, where it is found
    return [package] if beside else [package, Path(torch.utils.cmake_prefix_path)]


@pytest.mark.parametrize("installed", ["cmake_install", "installed_package"])
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


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        (["cpu"], "cpu"),
        (["cpu", "cuda12", "cuda13", "cuda14"], "cuda13"),
        (["cpu", "cuda12"], "cuda12"),
        (["cpu", "cuda14"], "cpu"),
        (["cuda14"], None),
        ([], None),
    ],
)
def test_the_library_for_this_torch(kinds, found, tmp_path):
    """CMake and Python choose the same one: of this series, and of no newer CUDA than torch's, here 13.0."""
    prefix = tmp_path / "env-cuda14"  # a name outside of the package says nothing
    fake_torch = tmp_path / "torch"
    lib, package = prefix / "lib", prefix / "share" / "cmake" / "fused_lars"
    for kind in [*(f"torch2.14-{kind}" for kind in kinds), "torch2.13-cuda13", "torch2.1-cuda13"]:
        (lib / kind).mkdir(parents=True)
        (lib / kind / "libfused_lars.so").touch()
    package.mkdir(parents=True)
    for name in ("fused_lars-config.cmake", "FusedLarsTorch.cmake"):
        shutil.copy(ROOT / "cmake" / name, package)
    (fake_torch / "share" / "cmake" / "Torch").mkdir(parents=True)
    (fake_torch / "share" / "cmake" / "Torch" / "TorchConfig.cmake").touch()
    (fake_torch / "version.py").write_text("__version__ = '2.14.1+cu130'\ncuda: Optional[str] = '13.0'\n")
    program = f"""
import types, torch
from fused_lars import _library
_library.torch = types.SimpleNamespace(__version__="2.14.1+cu130", version=types.SimpleNamespace(cuda="13.0"))
_library._LIB = _library.Path({str(lib)!r})
try:
    print("found:", _library._library().parent.name)
except ImportError as error:
    print(error)
"""
    script = tmp_path / "script.cmake"
    script.write_text(
        f"""
function(add_library)
endfunction()
function(set_target_properties)
endfunction()
set(Torch_DIR "{fake_torch}/share/cmake/Torch")
include("{package}/fused_lars-config.cmake")
get_filename_component(folder "${{_fused_lars_library}}" DIRECTORY)
get_filename_component(folder "${{folder}}" NAME)
message("found: ${{folder}}")
message("${{fused_lars_NOT_FOUND_MESSAGE}}")
"""
    )
    by_cmake = run(tool("cmake"), "-P", script)
    by_python = run(sys.executable, "-c", program, **python_program.environment())
    if found:
        assert f"found: torch2.14-{found}\n" in by_cmake
        assert f"found: torch2.14-{found}\n" in by_python
    else:
        there = ", ".join(sorted(folder.name for folder in lib.iterdir()))
        assert (
            f"no library for torch 2.14.1+cu130 (CUDA 13.0) in {fake_torch}. {lib} has: {there}" in by_cmake
        )
        assert f"has no library for torch 2.14.1+cu130 (CUDA 13.0). {lib} has {there}. Build it" in by_python


def libraries() -> list[Path]:
    return sorted((Path(fused_lars.__file__).parent / "lib").rglob("*.so"))


def test_no_other_libraries_are_needed():
    """The runtimes of OpenMP and CUDA are LibTorch's, whose file names differ between builds of torch."""
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
    known = {"libtorch.so", "libtorch_cpu.so", "libc10.so", "libc10_cuda.so", "libfused_lars_kernels.so"}
    for library in libraries():
        needed = set(re.findall(r"\(NEEDED\) .*\[(.*)\]", run("readelf", "-d", library)))
        assert needed
        assert needed <= system | known, library


def test_the_library_shows_its_api_only():
    """It exports only functions and data that a header declares. The rest is inlined from torch."""
    headers = "".join(file.read_text() for file in (ROOT / "csrc" / "include").rglob("*.h"))
    public = set(re.findall(r"\w+", headers))
    for library in libraries():
        is_kernels = library.name == "libfused_lars_kernels.so"  # which only libfused_lars.so calls
        names, least = ({"launch", "workspace_words"}, 2) if is_kernels else (public, 21)
        listed = run("nm", "-DC", "--defined-only", library)
        symbols = re.findall(r"^\w+ ([A-TX-Z]) (.*)$", listed, re.MULTILINE)
        assert len(symbols) >= least
        for _, symbol in symbols:
            found = re.match(r"(?:non-virtual thunk to )?fused_lars::([\w:]+)", symbol)
            assert found, symbol
            assert set(re.findall(r"\w+", found[1])) <= names, symbol
        assert not re.search("fused_lars.*anonymous namespace", listed)


def test_errors_do_not_say_where_the_library_was_built():
    text = b"".join(library.read_bytes() for library in libraries())
    assert b"csrc/checks.cpp" in text
    for folder in (ROOT / "csrc", Path(torch.__file__).parent / "include"):
        for path in (folder, folder.resolve()):
            assert str(path).encode() not in text
