"""Makes a step by any implementation, with any layout and dtype, and checks it against reference.py."""

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import bounds
import reference
import rounding
import torch_versions
from fused_lars import LARS
from layouts import Layout, Layouts, outside
from reference import Rule

IMPLEMENTATIONS = ("fused", "foreach", "op")
HYPERPARAMETERS = [field.name for field in dataclasses.fields(Rule)]
STATE = ("momentum_buffer", "master_param", "step", "momentum_scale", "rng_state")
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Dtypes:
    param: torch.dtype
    grad: torch.dtype | None = None
    state: torch.dtype | None = None  # of the momentum buffer
    master: bool = False
    stochastic: bool = False

    @property
    def switches(self) -> dict[str, bool]:
        """The options of a rule that these dtypes need."""
        return {"master_weights": self.master, "stochastic_rounding": self.stochastic}


@dataclass
class Leaf:
    """A parameter, its gradient and its state."""

    name: str
    rule: Rule
    param: Tensor
    grad: Tensor
    momentum_buffer: Tensor | None = None
    master_param: Tensor | None = None
    step: Tensor | None = None
    momentum_scale: Tensor | None = None
    rng_state: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.param if self.master_param is None else self.master_param

    @property
    def rounds_weight(self) -> bool:
        """Whether a step rounds the weight stochastically."""
        return self.rule.stochastic_rounding and _is_half(self.weight)

    @property
    def rounds_momentum(self) -> bool:
        """Whether a step rounds the momentum buffer stochastically."""
        if self.momentum_buffer is not None and self.momentum_buffer.dtype == torch.int8:
            return True
        own = _is_half(self.weight) and not self.rule.stochastic_rounding
        return _is_half(self.momentum_buffer) and not own

    def tensors(self) -> dict[str, Tensor]:
        names = ("param", "grad", *STATE)
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns. NaN then equals itself, and 0 differs from -0."""
    return tensor.detach().contiguous().reshape(-1).view(_BITS[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a).cpu(), bits(b).cpu())


def make_leaf(name: str, layouts: Layouts, dtypes: Dtypes, rule: Rule, device, generator) -> Leaf:
    def place(layout, dtype):
        layout = layout or layouts.param
        # A buffer of int8 may be permuted, but has no gaps.
        return (layout.dense() if dtype == torch.int8 else layout).place(dtype, device, generator)

    leaf = Leaf(
        name, rule, place(layouts.param, dtypes.param), place(layouts.grad, dtypes.grad or dtypes.param)
    )
    if dtypes.master:
        leaf.master_param = place(layouts.state, torch.float32)
        leaf.param.copy_(leaf.master_param)
    if rule.momentum > 0:
        leaf.momentum_buffer = place(layouts.state, dtypes.state or dtypes.param)
        if rule.dampening > 0:
            leaf.step = torch.zeros((), device=device)
        if leaf.momentum_buffer.dtype == torch.int8:
            blocks = -(-leaf.param.numel() // bounds.BLOCK)
            leaf.momentum_scale = Layout((blocks,)).place(torch.float32, device, generator)
            leaf.momentum_scale.abs_().mul_(0.02)
    if leaf.rounds_weight or leaf.rounds_momentum:
        leaf.rng_state = Layout((3,), None, 1).place(torch.int64, device, generator)
        # A key, a number of updates and a first element that fill both of their words.
        words = torch.randint(2**34, (3,), generator=generator)
        leaf.rng_state.copy_(words * torch.tensor([2**28 + 1, 1, 1]))
    return leaf


def group_leaves(leaves: list[Leaf], key) -> list[list[Leaf]]:
    """Consecutive leaves with the same key."""
    return [list(group) for _, group in itertools.groupby(leaves, key)]


def call_op(
    leaves: list[Leaf], *, tensor_lr=False, squared_norms=None, grad_scale=None, found_inf=None, op="step_"
):
    """Calls torch.ops.fused_lars.step_ and returns the trust ratios."""
    return call_op_for_norms(
        leaves,
        tensor_lr=tensor_lr,
        squared_norms=squared_norms,
        grad_scale=grad_scale,
        found_inf=found_inf,
        op=op,
    )[0]


def call_op_for_norms(
    leaves: list[Leaf],
    *,
    tensor_lr=False,
    squared_norms=None,
    grad_scale=None,
    found_inf=None,
    masters_follow=False,
    op="step_",
):
    """Like call_op, but returns the trust ratios and the norms."""
    groups = group_leaves(leaves, lambda leaf: id(leaf.rule))
    values = {name: [getattr(group[0].rule, name) for group in groups] for name in HYPERPARAMETERS}
    device = leaves[0].param.device
    if tensor_lr:
        values["lr"] = [torch.tensor(lr, dtype=torch.float64, device=device) for lr in values["lr"]]
    ratios = torch.full((len(leaves),), torch.nan, dtype=torch.float64, device=device)
    norms = torch.full((len(leaves), 2), torch.nan, dtype=torch.float64, device=device)
    packet = getattr(torch.ops.fused_lars, op)
    (packet.tensor_lr if tensor_lr else packet.default)(
        [leaf.param for leaf in leaves],
        [leaf.grad for leaf in leaves],
        *([getattr(leaf, name) for leaf in leaves if getattr(leaf, name) is not None] for name in STATE),
        [len(group) for group in groups],
        **values,
        squared_norms=squared_norms,
        grad_scale=grad_scale,
        found_inf=found_inf,
        trust_ratios=ratios,
        layer_norms=norms,
        masters_follow=masters_follow,
    )
    return ratios, norms


def _momentum_dtype(leaf: Leaf):
    """The momentum_dtype that lets an optimizer keep the leaf's buffer as it is."""
    buffer = leaf.momentum_buffer
    if buffer is None or buffer.dtype in (torch.float32, leaf.weight.dtype):
        return None
    return "int8" if buffer.dtype == torch.int8 else buffer.dtype


def make_optimizer(leaves: list[Leaf], *, tensor_lr=False, **options) -> LARS:
    """Makes a LARS that steps the leaves' own tensors."""
    groups = []
    for group in group_leaves(leaves, lambda leaf: (id(leaf.rule), _momentum_dtype(leaf))):
        values = dataclasses.asdict(group[0].rule)
        values["momentum_dtype"] = _momentum_dtype(group[0])
        if tensor_lr:
            values["lr"] = torch.tensor(values["lr"], dtype=torch.float64, device=group[0].param.device)
        groups.append({"params": [leaf.param.requires_grad_() for leaf in group], **values})
    optimizer = LARS(groups, **options)
    for leaf in leaves:
        if leaf.grad.dtype != leaf.param.dtype:
            leaf.param.grad_dtype = leaf.grad.dtype
        leaf.param.grad = leaf.grad
        for name, tensor in leaf.tensors().items():
            if name not in ("param", "grad"):
                optimizer.state[leaf.param][name] = tensor
    return optimizer


def _is_half(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)


def run(
    implementation: str, leaves: list[Leaf], *, tensor_lr=False, grad_scale=None, found_inf=None
) -> tuple[Tensor, Tensor]:
    """Makes a step. Returns the trust ratios and the norms, in fp64 on the CPU."""
    for_ops = not torch_versions.GRADIENTS_HAVE_DTYPES and any(
        leaf.grad.dtype != leaf.param.dtype for leaf in leaves
    )
    if implementation == "op" or for_ops:
        op = "reference_step_" if implementation == "foreach" else "step_"
        results = call_op_for_norms(
            leaves, tensor_lr=tensor_lr, grad_scale=grad_scale, found_inf=found_inf, op=op
        )
        return tuple(result.cpu() for result in results)
    optimizer = make_optimizer(leaves, tensor_lr=tensor_lr, **{implementation: True})
    # This is how GradScaler passes them.
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf
    optimizer.step()
    ratios, norms = optimizer.trust_ratios(), optimizer.layer_norms()
    return (
        torch.stack([ratios[leaf.param] for leaf in leaves]).cpu(),
        torch.stack([torch.stack(norms[leaf.param]) for leaf in leaves]).cpu(),
    )


def to_numpy(tensor: Tensor):
    return tensor.detach().to("cpu", torch.float64).numpy()


def assert_within(actual: Tensor, expected, error, what: str, *, stochastic=False) -> None:
    """Checks `actual` up to `error` and the rounding of its dtype. inf and NaN must be equal."""
    stored = bounds.stored_stochastically if stochastic else bounds.stored
    allowed = stored(np.asarray(expected, np.float64), error, actual.dtype)
    _assert_within(actual, expected, allowed, what)


def _assert_within(actual: Tensor, expected, allowed, what: str) -> None:
    expected, allowed = (torch.as_tensor(x, dtype=torch.float64) for x in (expected, allowed))
    got = actual.detach().to("cpu", torch.float64).reshape(expected.shape)
    special = ~expected.isfinite()
    right = torch.where(
        special, (got == expected) | (got.isnan() & expected.isnan()), (got - expected).abs() <= allowed
    )
    if not right.all():
        at = (~right).nonzero()[0].tolist()
        where = tuple(at)
        raise AssertionError(
            f"{what}{at}: {got[where].item()!r}, expected {expected[where].item()!r}, "
            f"off by {(got - expected).abs()[where].item():.3g}, allowed {allowed[where].item():.3g}; "
            f"{(~right).sum().item()} of {right.numel()} elements are off"
        )


def snapshot(leaves: list[Leaf]) -> list[dict[str, Tensor]]:
    """Copies every leaf's tensors, with the storage around them."""
    return [{name: tensor.detach().clone() for name, tensor in leaf.tensors().items()} for leaf in leaves]


def check_step(
    implementation: str, leaves: list[Leaf], *, tensor_lr=False, grad_scale=None, found_inf=None
) -> None:
    """Runs a step and checks every tensor against the reference, also those that it must not write."""
    before = snapshot(leaves)
    around = [{name: outside(tensor) for name, tensor in leaf.tensors().items()} for leaf in leaves]
    scale = 1.0 if grad_scale is None else grad_scale.item()
    ratios, norms = run(
        implementation, leaves, tensor_lr=tensor_lr, grad_scale=grad_scale, found_inf=found_inf
    )
    skipped = found_inf is not None and found_inf.item() != 0
    for leaf, old, guards, ratio, norm in zip(leaves, before, around, ratios, norms):
        for name, tensor in leaf.tensors().items():
            assert same_bits(outside(tensor), guards[name]), f"{leaf.name}: wrote outside of {name}"
            if skipped or name == "grad":
                assert same_bits(tensor, old[name]), f"{leaf.name}: {name} changed"
        if not skipped:
            check_leaf(leaf, old, ratio, norm, scale)
        else:
            assert ratio.isnan()
            assert norm.isnan().all()


def _momentum(tensors: dict[str, Tensor]):
    """The momentum that a leaf's tensors hold."""
    if "momentum_scale" in tensors:
        return rounding.decode(tensors["momentum_buffer"], tensors["momentum_scale"]).numpy()
    return to_numpy(tensors["momentum_buffer"]) if "momentum_buffer" in tensors else None


def _check_momentum(leaf: Leaf, expected, error) -> None:
    what = f"{leaf.name}: momentum_buffer"
    if leaf.momentum_scale is None:
        assert_within(leaf.momentum_buffer, expected, error, what, stochastic=leaf.rounds_momentum)
        return
    codes = rounding.in_memory_order(leaf.momentum_buffer, leaf.momentum_buffer)
    assert codes.to(torch.int32).abs().max() <= 127 if codes.numel() else True, f"{what}: codes"
    got, expected, error = (
        rounding.in_memory_order(torch.as_tensor(x), leaf.momentum_buffer)
        for x in (_momentum(leaf.tensors()), expected, error)
    )
    _assert_within(got, expected, bounds.stored_in_int8(expected.numpy(), error.numpy()), what)


def check_leaf(leaf: Leaf, old: dict[str, Tensor], ratio: Tensor, norms: Tensor, grad_scale: float) -> None:
    """Checks a leaf after a step against the reference's step from `old`."""
    weight = "param" if leaf.master_param is None else "master_param"
    result = reference.step(
        to_numpy(old[weight]),
        to_numpy(old["grad"]),
        _momentum(old),
        leaf.rule,
        grad_scale=grad_scale,
        first="step" in old and old["step"].item() == 0,
    )
    dtypes = old[weight].dtype, old["grad"].dtype
    weight_error, buffer_error = bounds.compute_errors(result, *dtypes)
    assert_within(
        leaf.weight, result.weight, weight_error, f"{leaf.name}: {weight}", stochastic=leaf.rounds_weight
    )
    if leaf.momentum_buffer is not None:
        _check_momentum(leaf, result.momentum_buffer, buffer_error)
    if leaf.master_param is not None:
        assert same_bits(leaf.param, leaf.master_param.to(leaf.param.dtype)), (
            f"{leaf.name}: param is not its master"
        )
    if leaf.step is not None:
        assert leaf.step.item() == old["step"].item() + 1, f"{leaf.name}: step"
    if leaf.rng_state is not None:
        key, updates, first_element = old["rng_state"].tolist()
        assert leaf.rng_state.tolist() == [key, updates + 1, first_element], f"{leaf.name}: rng_state"
    numel, terms = old[weight].numel(), result.norms.terms
    error = bounds.trust_ratio_error(*dtypes, numel, terms) * result.trust_ratio
    assert_within(ratio, result.trust_ratio, error, f"{leaf.name}: trust ratio")
    error = bounds.SLACK * bounds.norm_error(dtypes[0], numel) * result.norms.weight
    assert_within(norms[0], result.norms.weight, error, f"{leaf.name}: |w|")
    error = bounds.SLACK * bounds.grad_norm_error(*dtypes, numel, terms) * result.norms.grad
    assert_within(norms[1], result.norms.grad, error, f"{leaf.name}: norm of the gradient")
