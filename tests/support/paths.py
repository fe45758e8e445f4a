"""The folders of the checkout and of the package under test, which may be an installed one."""

from pathlib import Path

import fused_lars

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fused_lars.__file__).parents[1]  # a folder for PYTHONPATH
