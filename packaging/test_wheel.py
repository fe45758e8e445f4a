"""Tests a wheel as its users have it: in a fresh environment with one torch, without a compiler.

python packaging/test_wheel.py WHEEL TORCH [pip's options]

TORCH is a version, such as 2.13.0 or 2.13.0+cpu. In the end, with the compiler back, a C++ project is built
against the installed package.
"""

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The rule, saved state, and programs in TorchScript: what a library for the wrong torch would break.
TESTS = [
    "ops/test_groups.py",
    "ops/test_rounding.py",
    "optimizer/test_resume.py",
    "optimizer/test_torch_optim.py",
    "programs/test_lars_by_id.py",
    "programs/test_torchscript.py",
]
TRAIN = """
import fused_lars, torch
print(fused_lars.__file__)
print(fused_lars.show_config())
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = fused_lars.LARS(model.parameters(), lr=1.0, momentum=0.9, trust_coefficient=0.02, fused=True)
x = torch.randn(256, 8)
losses = []
for _ in range(100):
    loss = (model(x) - x.square().sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3g} to {losses[-1]:.3g}")
assert losses[-1] < losses[0] / 10
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("torch")
    args, pip_options = parser.parse_known_args()

    if not args.wheel.is_file():
        sys.exit(f"{args.wheel} is missing; build it: make wheels")
    folder = ROOT / "build" / "wheel-tests" / args.torch
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"

    def run(*command, path: str) -> None:
        environment = {**os.environ, "PATH": path}
        environment.pop("PYTHONPATH", None)
        subprocess.run([str(part) for part in command], cwd=folder, env=environment, check=True)

    def tests(*arguments, path: str) -> None:
        files_of_tests = ["-o", f"pythonpath={ROOT / 'tests' / 'support'}", "--rootdir", ROOT / "tests"]
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
        run(*command, *files_of_tests, *arguments, path=path)

    no_compiler = str(folder / "bin")
    packages = [f"torch=={args.torch}", args.wheel.resolve(), "cmake", "hypothesis", "numpy", "pytest"]
    run(python, "-m", "pip", "install", "--quiet", *pip_options, *packages, path=os.environ["PATH"])
    run(python, "-c", TRAIN, path=no_compiler)
    tests(
        *(ROOT / "tests" / file for file in TESTS),
        "-k",
        "not cuda and not program_without_python",
        path=no_compiler,
    )
    consumer = ROOT / "tests" / "programs" / "test_find_package.py"
    tests(consumer, "-k", "installed_package", path=f"{no_compiler}:{os.environ['PATH']}")


main()
