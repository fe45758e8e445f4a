"""The rule of docs/design.md in numpy on float64, one tensor at a time. It does not call the package."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Hyperparameters of a group, with the names that LARS uses."""

    lr: float = 1.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    trust_coefficient: float = 0.001
    eps: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    trust_clip: bool = False
    layer_adaptation: bool = True
    decayed_norm: bool = False
    classic_momentum: bool = True
    master_weights: bool = False
    stochastic_rounding: bool = False


@dataclass(frozen=True)
class Result:
    """The expected result of a step, and the sizes of the terms that its rounding errors are relative to."""

    weight: np.ndarray
    momentum_buffer: np.ndarray
    trust_ratio: float
    norms: "Norms"
    update_terms: np.ndarray  # the weight's change, every term by its absolute value
    buffer_terms: np.ndarray  # the same for the momentum buffer


def norm(x) -> float:
    # Sums in more than fp64 if the machine has it.
    return float(np.sqrt(np.sum(np.square(x, dtype=np.longdouble))))


@dataclass(frozen=True)
class Norms:
    """The norms that a step takes of a parameter and its gradient."""

    weight: float
    grad: float  # of g', or of g' + weight_decay * w with decayed_norm
    # The summed norms of g' and weight_decay * w, relative to `grad`. Large if the two cancel.
    terms: float = 0.0


def norms(weight, grad, rule: Rule, grad_scale: float = 1.0) -> Norms:
    """Takes the norms. `grad` is as stored, before division by grad_scale."""
    if not rule.decayed_norm:
        return Norms(norm(weight), norm(grad) / grad_scale)
    g, decay = (-grad if rule.maximize else grad) / grad_scale, rule.weight_decay * weight
    with np.errstate(invalid="ignore", over="ignore"):
        result = norm(g + decay)
    return Norms(norm(weight), result, (norm(g) + norm(decay)) / result if result > 0 else 0.0)


def trust_ratio(norms: Norms, rule: Rule) -> float:
    q = 1.0
    if rule.layer_adaptation and norms.weight > 0 and norms.grad > 0:
        divisor = norms.grad if rule.decayed_norm else norms.grad + rule.weight_decay * norms.weight
        q = rule.trust_coefficient * norms.weight / (divisor + rule.eps)
    if rule.trust_clip:
        q = min(q / rule.lr, 1.0) if rule.lr > 0 else 1.0
    return q


def step(weight, grad, momentum_buffer, rule: Rule, *, grad_scale=1.0, first=False) -> Result:
    """Makes one step. A missing momentum_buffer means zeros. `first`: no step was applied before."""
    w, g = np.asarray(weight, np.float64), np.asarray(grad, np.float64)
    v = np.zeros_like(w) if momentum_buffer is None else np.asarray(momentum_buffer, np.float64)
    of_step = norms(w, g, rule, grad_scale)
    q = trust_ratio(of_step, rule)

    def apply(w, g, v, minus):
        """The formulas. With minus = +1 and absolute values, they give the summed sizes of their terms."""
        g = g / grad_scale
        u = q * (g + rule.weight_decay * w)
        m = rule.momentum
        if rule.classic_momentum:
            new_v = m * v + rule.lr * u
            change = m * new_v + rule.lr * u if rule.nesterov else new_v
        else:
            undamped = first or m == 0
            new_v = m * v + (1 if undamped else 1 - rule.dampening) * u
            change = rule.lr * (u + m * new_v if rule.nesterov else new_v)
        return w + minus * change, new_v, change

    with np.errstate(invalid="ignore", over="ignore"):
        new_w, new_v, _ = apply(w, -g if rule.maximize else g, v, -1.0)
        _, buffer_terms, update_terms = apply(np.abs(w), np.abs(g), np.abs(v), 1.0)
    return Result(new_w, new_v, q, of_step, update_terms, buffer_terms)
