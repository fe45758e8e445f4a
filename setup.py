"""Runs CMake. CMakeLists.txt is the only definition of the build, and pyproject.toml has the metadata.

    pip install .

builds against the installed torch. FUSED_LARS_CUDA, TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured.
`make wheels` sets FUSED_LARS_TORCHES to folders of torch packages: then the wheel has libraries for each.
"""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    # Without build isolation, pip does not check the build requirements in pyproject.toml.
    needed = re.search(r"setuptools>=[\d.]+", (ROOT / "pyproject.toml").read_text())[0]
    sys.exit(
        f"fused_lars is built with {needed}, and {sys.executable} has {setuptools.__version__}. "
        f"Run: pip install --upgrade '{needed}'"
    )


def tool(name: str) -> str | None:
    """The path of a program on the PATH or beside this Python, where pip installs programs."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def from_cmake(pattern: str) -> str:
    return re.search(pattern, (ROOT / "CMakeLists.txt").read_text())[1]


def find_torch() -> Path | None:
    """The folder of the torch to build against.

    pip's isolated builds hide what is installed from imports. It is the torch that the library will run with
    all the same, so this Python's site-packages are searched too.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None:
        site_packages = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
        spec = importlib.machinery.PathFinder.find_spec("torch", site_packages)
    folder = Path(spec.submodule_search_locations[0]) if spec else None
    return folder if folder and (folder / "version.py").is_file() else None  # pip leaves empty folders behind


TORCHES = [Path(folder) for folder in os.environ.get("FUSED_LARS_TORCHES", "").split()]


def torch_requirement() -> str:
    """The series of torch that a wheel built here works with. Without torch (an sdist), all that may work.

    A wheel for several series has no upper limit: pip would replace a newer torch by an older one to keep it,
    which costs gigabytes and more surprise than the ImportError that a torch without a library gives.
    """
    torch = None if TORCHES else find_torch()
    if torch is None:
        return "torch>=" + from_cmake(r"set\(FUSED_LARS_OLDEST_TORCH ([\d.]+)")
    return "torch==" + re.search(r"__version__ = '(\d+\.\d+)", (torch / "version.py").read_text())[1] + ".*"


class CMakeBuild(build_ext):
    """Builds the C++ part and installs it into the package, in build_lib or (editable) in the checkout."""

    def run(self) -> None:
        torch = find_torch()
        if torch is None and not TORCHES:
            sys.exit(
                f"fused_lars is built against the torch that is installed, and {sys.executable} has none. "
                "If torch is installed, this build is isolated from it: add --no-build-isolation. "
                "If it is not, install torch first"
            )
        cmake = tool("cmake") or sys.exit("fused_lars needs CMake: pip install cmake ninja")
        in_place = self.inplace or self.editable_mode
        package = (
            ROOT / "torch_ext" / "fused_lars" if in_place else Path(self.build_lib, "fused_lars").resolve()
        )
        # One build folder for all series of torch, so that what knows no torch is compiled once.
        build = f"{self.build_temp}-portable" if TORCHES else self.build_temp
        options = [f"-DCMAKE_INSTALL_PREFIX={package}", f"-DFUSED_LARS_WHEEL={'OFF' if in_place else 'ON'}"]
        options += [f"-DFUSED_LARS_PORTABLE={'ON' if TORCHES else 'OFF'}"]
        if ninja := tool("ninja"):
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        for name in ("include", "lib", "share"):  # of an earlier build, which may be for another torch
            shutil.rmtree(package / name, ignore_errors=True)
        for folder in TORCHES or [torch]:
            where = ["-S", ROOT, "-B", build, f"-DTorch_DIR={folder / 'share/cmake/Torch'}"]
            subprocess.run([cmake, *where, *options], check=True)
            subprocess.run([cmake, "--build", build, "--parallel", jobs, "--target", "install"], check=True)

    # setuptools asks these about Python extension modules. There are none.
    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPythonWheel(bdist_wheel):
    """A wheel for all versions of Python, because the library does not depend on Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    version=from_cmake(r"project\(fused_lars VERSION ([\d.]+)"),
    install_requires=[torch_requirement()],
    ext_modules=[Extension("fused_lars", [])],  # makes the wheel specific to a platform
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
)
