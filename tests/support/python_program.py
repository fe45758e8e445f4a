"""Runs programs in a new Python, with the package that the tests import."""

import os
import subprocess
import sys

from paths import PACKAGE, ROOT


def environment(*folders) -> dict[str, str]:
    """The tests' environment, but Python looks for modules in these folders first, then in the package's."""
    path = [*folders, PACKAGE, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}


def run(*arguments, path=(), status=0):
    """Runs Python in the checkout and returns its output. It must exit with `status`."""
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
