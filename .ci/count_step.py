"""Counts what a CUDA step does on models' shapes, under the simulator of .ci/run and with its L2.

Exits 1 where the second of two steps takes more launches than its parameters need, any host synchronisation,
copy or memset, more DRAM bytes a parameter than the limit (dirty lines at the end included), or as many
instructions a parameter as apex's kernels, 38 (small tensors: 66). Kernels that round stochastically have
limits of their own.
"""

import sys
from typing import NamedTuple

import cudasim_torch
import torch
import torchvision

import fused_lars


class Types(NamedTuple):
    dtype: torch.dtype
    options: dict
    bytes: float  # the limit, of any L2: shared memory keeps what is needed again
    instructions: float = 38.0


SMALL = "3,000 tensors of 2,000"
F32, BF16 = torch.float32, torch.bfloat16
TYPES = {
    "fp32": Types(F32, {}, 20.1),
    "bf16": Types(BF16, {}, 10.1),
    "bf16, fp32 masters": Types(BF16, {"master_weights": True}, 20.1),
}
ROUNDED_TYPES = {
    "fp32, bf16 momentum": Types(F32, {"momentum_dtype": BF16}, 16.1, 55.0),
    "fp32, int8 momentum": Types(F32, {"momentum_dtype": "int8"}, 14.2, 135.0),
    "bf16, stochastic": Types(BF16, {"stochastic_rounding": True}, 10.1, 70.0),
    "bf16, int8 momentum": Types(BF16, {"stochastic_rounding": True, "momentum_dtype": "int8"}, 8.2, 130.0),
}
# Tensors of 2,000 elements leave almost half of a tile's threads without work.
INSTRUCTIONS_OF_SMALL = 66.0
OF_A_DECAYED_NORM = 3.0  # two products and a sum for each element
NOTHING_OF = ("host_syncs", "memsets", "memcpy_h2d", "memcpy_d2h", "memcpy_d2d")


def shapes_of(make):
    with torch.device("meta"):
        return [tuple(p.shape) for p in make().parameters()]


def count(shapes, types, decayed_norm=False):
    torch.manual_seed(0)
    dtype, options = types.dtype, {**types.options, "decayed_norm": decayed_norm}
    params = [torch.nn.Parameter((0.05 * torch.randn(s)).to(dtype).cuda()) for s in shapes]
    groups = [{"params": [p for p in params if p.ndim > 1]}]
    if rest := [p for p in params if p.ndim <= 1]:
        groups.append({"params": rest, "weight_decay": 0.0, "layer_adaptation": False})
    optimizer = fused_lars.LARS(groups, lr=0.5, momentum=0.9, weight_decay=1e-4, **options)
    for _ in range(2):  # the first makes state
        for p in params:
            p.grad = (1e-3 * torch.randn(p.shape)).to(dtype).cuda()
        cudasim_torch.l2_flush()
        cudasim_torch.reset_stats()
        optimizer.step()
        stats = cudasim_torch.stats()
    return stats["api"], stats["totals"]


def main() -> None:
    l2 = torch.cuda.get_device_properties(0).L2_cache_size / 2**20
    resnet, vit = (shapes_of(make) for make in (torchvision.models.resnet50, torchvision.models.vit_b_16))
    all_types = {**TYPES, **ROUNDED_TYPES}
    cases = [("ResNet-50", resnet, types, 1, False) for types in all_types]
    cases += [("ResNet-50, decayed", resnet, types, 1, True) for types in TYPES]
    cases += [("ViT-B/16", vit, "fp32", 1, False)]
    cases += [(SMALL, [(40, 50)] * 3000, "fp32", 4, False)]
    failed = []
    for name, shapes, types, launches, decayed_norm in cases:
        limits = all_types[types]
        api, totals = count(shapes, limits, decayed_norm)
        n = sum(torch.Size(shape).numel() for shape in shapes)
        dram = (totals["dram_read_bytes"] + totals["dram_write_bytes"] + totals["l2_dirty_bytes"]) / n
        instructions = totals["thread_instructions"] / n
        most_instructions = INSTRUCTIONS_OF_SMALL if name == SMALL else limits.instructions
        most_instructions += OF_A_DECAYED_NORM * decayed_norm
        limit = limits.bytes
        others = {key: api[key] for key in NOTHING_OF if api[key]}
        if totals["launches"] > launches or dram > limit or instructions >= most_instructions or others:
            failed.append(f"{name}, {types}")
        print(
            f"L2 {l2:2.0f} MB  {name:22}  {types:20}  launches {totals['launches']} (limit {launches})  "
            f"DRAM B/param {dram:.2f} (limit {limit})  instructions/param {instructions:.1f}  {others}",
            flush=True,
        )
    if failed:
        sys.exit(f"over the limit: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
