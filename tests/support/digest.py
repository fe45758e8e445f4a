"""Prints digests of a step's results on fixed inputs, a line for each number of threads.

    python digest.py DEVICE THREADS...

A line has one digest of steps that round to nearest and one of steps that round stochastically.
It needs its own process, which chooses an instruction set (ATEN_CPU_CAPABILITY) and a simulated GPU once.
"""

import hashlib
import sys

import torch

from cases import DTYPES, OPTIONS, ROUNDED_DTYPES
from layouts import LAYOUTS, Layout, Layouts
from reference import Rule
from stepping import Dtypes, bits, call_op, make_leaf

# Large enough for several batches of several threads' tiles, and not a multiple of any size.
LARGE = Layouts(Layout((700_001,)))


def digest(device: str, of_dtypes: dict[str, Dtypes], large: tuple[str, ...]) -> str:
    generator = torch.Generator().manual_seed(0)
    leaves = []
    names = ("everything classic", "everything torch", "plain", "everything with a decayed norm")
    for options in map(OPTIONS.__getitem__, names):
        for dtypes in of_dtypes.values():
            rule = Rule(**options, **dtypes.switches)
            for layouts in (
                LAYOUTS["tiles"],
                LAYOUTS["misaligned"],
                LAYOUTS["rows with gaps"],
                LAYOUTS["0-dim"],
            ):
                leaves.append(make_leaf("", layouts, dtypes, rule, device, generator))
        for name in large:
            rule = Rule(**options, **of_dtypes[name].switches)
            leaves.append(make_leaf("", LARGE, of_dtypes[name], rule, device, generator))
    sha = hashlib.sha256(bits(call_op(leaves)).cpu().numpy().tobytes())
    for leaf in leaves:
        for tensor in leaf.tensors().values():
            sha.update(bits(tensor).cpu().numpy().tobytes())
    norms = torch.ops.fused_lars.squared_norms(
        [leaf.weight for leaf in leaves], [leaf.grad for leaf in leaves]
    )
    sha.update(bits(norms).cpu().numpy().tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    for threads in map(int, sys.argv[2:]):
        torch.set_num_threads(threads)
        exact = digest(sys.argv[1], DTYPES, ("fp32", "bf16, master", "fp64"))
        rounded = digest(sys.argv[1], ROUNDED_DTYPES, ("fp32, momentum int8", "bf16, stochastic"))
        print(exact, rounded, sep="-")
