"""fused_lars::LARS, the optimizer of the C++ front end, gives the same bits as fused_lars.LARS."""

import pytest
import torch

import cpp_program
from fused_lars import LARS

SHAPES = [(64, 33), (33,), (), (0, 3), (20000,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MOMENTUM = {"lr": 0.7, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.02}
TORCH_FORM = {**MOMENTUM, "classic_momentum": False}

# Options of two groups. Each group has half of a case's parameters: of every shape, fp32 and bf16 ones in the
# first, and fp64 and fp16 ones in the second. In a case of WITH_FP16, fp16 and bf16 change places.
CASES = {
    "defaults": ({}, {}),
    "weights_and_bias": (MOMENTUM, {**MOMENTUM, "weight_decay": 0.0, "layer_adaptation": False}),
    "nesterov_maximize": ({**MOMENTUM, "nesterov": True}, {**MOMENTUM, "maximize": True}),
    "dampening": ({**TORCH_FORM, "dampening": 0.3}, {**TORCH_FORM, "nesterov": True}),
    "decayed_norm": (
        {**MOMENTUM, "decayed_norm": True},
        {**TORCH_FORM, "decayed_norm": True, "maximize": True, "eps": 1e-3},
    ),
    "eps_trust_clip": ({**MOMENTUM, "eps": 1e-3}, {**MOMENTUM, "lr": 0.01, "trust_clip": True}),
    "master_weights": (
        {**MOMENTUM, "master_weights": True},
        {**TORCH_FORM, "dampening": 0.1, "master_weights": True},
    ),
    "stochastic_rounding": (
        {**MOMENTUM, "stochastic_rounding": True},
        {**TORCH_FORM, "stochastic_rounding": True, "rounding_seed": 2**31 - 1},
    ),
    "momentum_bfloat16": (
        {**MOMENTUM, "momentum_dtype": "bfloat16", "rounding_seed": 5},
        {**MOMENTUM, "momentum_dtype": "float32"},
    ),
    "momentum_bfloat16_masters": (
        {**TORCH_FORM, "momentum_dtype": "bfloat16", "master_weights": True},
        {**MOMENTUM, "momentum_dtype": "float32", "stochastic_rounding": True},
    ),
    "momentum_int8": (
        {**MOMENTUM, "momentum_dtype": "int8", "rounding_seed": 5},
        MOMENTUM,
    ),
    "momentum_int8_stochastic": (
        {**MOMENTUM, "momentum_dtype": "int8", "stochastic_rounding": True},
        {**TORCH_FORM, "dampening": 0.1, "momentum_dtype": "float32", "master_weights": True},
    ),
    "momentum_int8_masters": (
        {**TORCH_FORM, "momentum_dtype": "int8", "master_weights": True, "nesterov": True},
        {**MOMENTUM, "stochastic_rounding": True, "rounding_seed": 7},
    ),
    "momentum_float16": (
        {**MOMENTUM, "momentum_dtype": "float16"},
        {**TORCH_FORM, "momentum_dtype": "float32", "stochastic_rounding": True},
    ),
    "momentum_int8_float16": (
        {**MOMENTUM, "momentum_dtype": "int8", "stochastic_rounding": True},
        MOMENTUM,
    ),
}
WITH_FP16 = {"momentum_float16", "momentum_int8_float16"}


def in_python(options: dict) -> dict:
    """The options as fused_lars.LARS takes them. The program gets a dtype by name."""
    dtype = options.get("momentum_dtype")
    return options if dtype in (None, "int8") else {**options, "momentum_dtype": getattr(torch, dtype)}


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_the_python_class(case, tmp_path):
    generator = torch.Generator().manual_seed(3)

    dtypes = [*DTYPES[:2], *reversed(DTYPES[2:])] if case in WITH_FP16 else DTYPES

    def tensors() -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES for dtype in dtypes]

    # Each group gets half of the dtypes of every shape.
    first, second = CASES[case]
    groups = [(first, tensors()[0::2]), (second, tensors()[1::2])]
    steps = [tensors() for _ in range(5)]
    steps = [grads[0::2] + grads[1::2] for grads in steps]
    torch.save((groups, steps), tmp_path / "run.pt")
    cpp_program.run("train_lars", tmp_path / "run.pt", tmp_path / "result.pt")

    params = [param for _, group_params in groups for param in group_params]
    optimizer = LARS([{"params": ps, **in_python(options)} for options, ps in groups])
    for grads in steps:
        for param, grad in zip(params, grads):
            param.grad = grad
        optimizer.step()
    results = torch.load(tmp_path / "result.pt", weights_only=False)
    assert len(results) == len(params)
    for result, param in zip(results, params):
        assert result.dtype == param.dtype
        assert torch.equal(result, param)
