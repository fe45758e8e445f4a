"""What setup.py says where it cannot build."""

import pathlib
import subprocess
import sys

import pytest

SETUP = pathlib.Path(__file__).parents[1] / "setup.py"


def test_old_setuptools():
    """Before 70.1 it had no bdist_wheel, and pip looks at build requirements in isolated builds only."""
    pytest.importorskip("setuptools", reason="setup.py needs setuptools")
    program = f"""
import runpy, sys
sys.modules["setuptools.command.bdist_wheel"] = None
runpy.run_path({str(SETUP)!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "fused_lars is built with setuptools>=70.1, and" in done.stderr
    assert "pip install --upgrade 'setuptools>=70.1'" in done.stderr
