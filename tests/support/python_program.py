"""Runs programs in a Python of their own, with the package that the tests import."""

import os
import subprocess
import sys

from paths import PACKAGE, ROOT


def environment(*folders) -> dict[str, str]:
    """The tests' own, in which Python finds modules in these folders first, and then the package."""
    path = [*folders, PACKAGE, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}


def run(*arguments, path=(), status=0):
    """Runs python with these arguments in the checkout, to end with a status; returns what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(*path),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout
