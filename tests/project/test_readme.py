"""The README's example is a whole program, and it trains."""

import re
import subprocess
import sys

from paths import ROOT
from python_program import environment

README = ROOT / "README.md"


def test_the_example_trains():
    (program,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
        if "import torch\n" in block  # the others show a line or two
    ]
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < 0.1 * losses[0]
    # Guessing gets 10 per cent.
    assert float(re.search(r"test accuracy ([\d.]+) %", done.stdout)[1]) > 85
    assert "0.weight   trust ratio" in done.stdout
