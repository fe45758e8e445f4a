"""Downloads PyPI's build of torch for Linux, and unpacks what compiling against it takes.

python packaging/fetch_torch.py 2.13.0 FOLDER

makes FOLDER/torch. The build has CUDA. CPU builds have the same headers and names of functions.
"""

import fnmatch
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NEEDED = [
    "torch/include/*",
    "torch/share/cmake/Torch/*",
    *(f"torch/lib/lib{name}.so" for name in ("c10", "c10_cuda", "torch", "torch_cpu")),
    "torch/version.py",  # the last: make takes it for the sign that all is there
]


def main() -> None:
    version, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        # Of ===, since == also takes 2.13.0+cpu from a local mirror.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", downloads, f"torch==={version}"], check=True)
        (wheel,) = Path(downloads).glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for pattern in NEEDED:
                names = fnmatch.filter(archive.namelist(), pattern)
                if not names:
                    sys.exit(f"{wheel.name} has no {pattern}: is it a CPU build?")
                archive.extractall(folder, names)


main()
