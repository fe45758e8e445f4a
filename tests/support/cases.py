"""Dtypes and options to make a step with, by name."""

import torch

from stepping import Dtypes

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
INT8 = torch.int8

DTYPES = {
    "fp32": Dtypes(F32),
    "fp64": Dtypes(F64),
    "fp64, grad fp32": Dtypes(F64, F32),
    "fp64, momentum fp32": Dtypes(F64, F64, F32),
    "bf16": Dtypes(BF16),
    "bf16, grad fp32": Dtypes(BF16, F32),
    "bf16, momentum fp32": Dtypes(BF16, BF16, F32),
    "bf16, grad and momentum fp32": Dtypes(BF16, F32, F32),
    "bf16, master": Dtypes(BF16, BF16, F32, master=True),
    "bf16, master, grad fp32": Dtypes(BF16, F32, F32, master=True),
    "fp16": Dtypes(F16),
    "fp16, grad fp32": Dtypes(F16, F32),
    "fp16, momentum fp32": Dtypes(F16, F16, F32),
    "fp16, master": Dtypes(F16, F16, F32, master=True),
}

# These are rounded stochastically.
ROUNDED_DTYPES = {
    "fp32, momentum bf16": Dtypes(F32, F32, BF16),
    "fp32, momentum fp16": Dtypes(F32, F32, F16),
    "fp32, momentum int8": Dtypes(F32, F32, INT8),
    "bf16, stochastic": Dtypes(BF16, stochastic=True),
    "fp16, stochastic": Dtypes(F16, stochastic=True),
    "bf16, momentum int8": Dtypes(BF16, BF16, INT8),
    "bf16, stochastic, grad fp32, momentum int8": Dtypes(BF16, F32, INT8, stochastic=True),
    "bf16, master, momentum bf16": Dtypes(BF16, BF16, BF16, master=True),
    "bf16, master, momentum int8": Dtypes(BF16, BF16, INT8, master=True),
}

# With these values an update is about as large as the weight, so a wrong term shows in bf16 too.
_MOMENTUM = dict(lr=0.7, momentum=0.6, weight_decay=0.3, trust_coefficient=0.8)
_TORCH = dict(_MOMENTUM, classic_momentum=False)

OPTIONS = {
    "plain": dict(lr=0.5, trust_coefficient=0.7),
    "weight decay": dict(lr=0.5, trust_coefficient=0.7, weight_decay=0.4),
    "eps": dict(lr=0.5, trust_coefficient=0.7, eps=3.0),
    "decayed norm": dict(lr=0.5, trust_coefficient=0.7, weight_decay=0.4, decayed_norm=True),
    "decayed norm without decay": dict(lr=0.5, trust_coefficient=0.7, decayed_norm=True),
    "decayed norm, torch momentum": dict(_TORCH, weight_decay=1.5, decayed_norm=True),
    "no adaptation": dict(lr=0.3, weight_decay=0.4, layer_adaptation=False),
    "maximize": dict(lr=0.5, trust_coefficient=0.7, weight_decay=0.4, maximize=True),
    "clip that clips": dict(lr=0.3, trust_coefficient=0.7, weight_decay=0.1, trust_clip=True),
    "clip that does not": dict(lr=2.0, trust_coefficient=0.7, weight_decay=0.1, trust_clip=True),
    "clip without adaptation": dict(lr=1.5, layer_adaptation=False, trust_clip=True),
    "classic momentum": _MOMENTUM,
    "classic nesterov": dict(_MOMENTUM, nesterov=True),
    "torch momentum": _TORCH,
    "torch nesterov": dict(_TORCH, nesterov=True),
    "dampening": dict(_TORCH, dampening=0.4),
    "full dampening": dict(_TORCH, dampening=1.0),
    "dampening without momentum": dict(_TORCH, momentum=0.0, dampening=0.4),
    "momentum without adaptation": dict(_MOMENTUM, layer_adaptation=False, lr=0.2),
    "everything classic": dict(_MOMENTUM, nesterov=True, maximize=True, trust_clip=True, eps=0.5),
    "everything with a decayed norm": dict(
        _MOMENTUM, nesterov=True, maximize=True, trust_clip=True, eps=0.5, decayed_norm=True
    ),
    "everything torch": dict(_TORCH, dampening=0.2, maximize=True, trust_clip=True, eps=0.5),
}

# For what costs too much time with all of them.
FEW_OPTIONS = (
    "plain",
    "classic momentum",
    "torch nesterov",
    "dampening",
    "everything classic",
    "everything with a decayed norm",
)
