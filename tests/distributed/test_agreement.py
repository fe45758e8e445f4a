"""Ranks step the same parameters in different ways: every rank raises, and nothing has changed."""

import re
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distributed_nets as nets
from distributed_harness import on_ranks
from distributed_nets import make_net, make_optimizer, train
from fused_lars import LARS
from fused_lars._sharded import peers
from step_record import record_step

SHAPES = {"a": (8, 3), "b": (5, 2), "c": (8, 3), "d": (6,)}


def make_params(names="abcd", dtype=torch.float32) -> list[tuple[str, nn.Parameter]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = []
    for seed, (name, shape) in enumerate(SHAPES.items()):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        params.append((name, nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))))
    return [named for name in names for named in params if named[0] == name]


def make(first="abc", second="d", dtype=torch.float32, **options) -> LARS:
    """An optimizer of two groups with gradients. `options` are those of the first group."""
    named = dict(make_params(dtype=dtype))
    groups = [
        {"params": [(name, named[name]) for name in first], **options},
        {"params": [(name, named[name]) for name in second], "layer_adaptation": False},
    ]
    optimizer = LARS([group for group in groups if group["params"]], lr=0.5, momentum=0.9, weight_decay=0.1)
    set_grads(optimizer)
    return optimizer


def params_of(optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_grads(optimizer) -> None:
    for p in params_of(optimizer):
        p.grad = torch.full_like(p, 0.1) + p.detach()


def values(optimizer) -> list[torch.Tensor]:
    tensors = [p.detach() for p in params_of(optimizer)]
    tensors += [optimizer.state[p]["momentum_buffer"] for p in params_of(optimizer)]
    return [t.to_local().clone() for t in tensors]


@contextmanager
def nothing_changes(optimizer):
    before = [p.detach().to_local().clone() for p in params_of(optimizer)]
    buffers = {p: dict(state) for p, state in optimizer.state.items()}
    copies = {p: {key: value.clone() for key, value in state.items()} for p, state in buffers.items()}
    yield
    assert all(map(torch.equal, before, (p.detach().to_local() for p in params_of(optimizer))))
    for p, state in buffers.items():
        for key, value in state.items():
            assert torch.equal(value.to_local(), copies[p][key].to_local())
    for p, state in optimizer.state.items():
        if p not in buffers and "momentum_buffer" in state:
            assert not state["momentum_buffer"].to_local().any()


def assert_raises(optimizer, match: str, error=ValueError) -> None:
    with nothing_changes(optimizer), pytest.raises(error, match=match or None):
        optimizer.step()


def is_one() -> bool:
    return dist.get_rank() == 1


# ---------------------------------------------------------------- at the first step


@on_ranks(2, 3, 4)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_another_order(momentum):
    """'a' and 'c' have the same shape, so their norms would be added up without an error."""
    optimizer = make("cba" if is_one() else "abc", momentum=momentum)
    assert_raises(
        optimizer,
        r"ranks 0, 1.* none has stepped: rank 1 has 'c', torch.float32 \(8, 3\) \(Shard\(dim=0\),\) as "
        "shared parameter 0 where rank 0 has 'a', ",
    )


@on_ranks(2, 4)
def test_swapped_groups():
    optimizer = make()
    if is_one():
        optimizer.param_groups.reverse()
    assert_raises(optimizer, r"rank 1 has 'd', .* as shared parameter 0 where rank 0 has 'a'")


@on_ranks(2, 4)
def test_other_groups():
    """The same parameters in the same order, but one is in another group."""
    optimizer = make(*(("ab", "cd") if is_one() else ("abc", "d")))
    assert_raises(optimizer, r"rank 1 has 2 shared parameters in the group .* 'a', .*; rank 0 has 3")


@on_ranks(2, 4)
@pytest.mark.parametrize("without", ["first", "last", "names"])
def test_other_parameters(without):
    """With another number of parameters a message has another length, and gloo would abort."""
    optimizer = make({"first": "bc", "last": "abc", "names": "abc"}[without] if is_one() else "abc",
                     "" if is_one() and without == "last" else "d")  # fmt: skip
    if without == "names" and is_one():
        for group in optimizer.param_groups:
            del group["param_names"]
    expected = {
        "first": "rank 1 has 'b', .* as shared parameter 0 where rank 0 has 'a'",
        "last": "rank 1 has 3 shared parameters and rank 0 has 4; the first that one of them lacks is 'd'",
        "names": r"rank 1 has torch.float32 \(8, 3\).* where rank 0 has 'a', ",
    }
    assert_raises(optimizer, expected[without])


@on_ranks(2)
@pytest.mark.parametrize("what", ["dtype", "placement", "shape"])
def test_another_kind_of_parameter(what):
    other, mesh = what if is_one() else None, init_device_mesh("cpu", (2,))
    local = torch.ones(2, 5 if other == "shape" else 4, dtype=torch.half if other == "dtype" else torch.float)
    if other == "placement":
        local = local.view(4, 2)
    placement = Shard(int(other == "placement"))
    param = nn.Parameter(DTensor.from_local(local, mesh, [placement], run_check=False))
    param.grad = torch.ones_like(param)
    text = {"dtype": r"torch.float16 \(4, 4\)", "placement": r".*\(Shard\(dim=1\),\)", "shape": r".*\(4, 5\)"}
    with pytest.raises(
        ValueError, match=rf"rank 1 has {text[what]}.* where rank 0 has torch.float32 \(4, 4\)"
    ):
        LARS([param]).step()


OTHER = {
    "lr": 0.25, "momentum": 0.8, "weight_decay": 0.2, "trust_coefficient": 0.002, "eps": 1e-6,
    "nesterov": True, "maximize": True, "trust_clip": True, "layer_adaptation": False, "decayed_norm": True,
    "classic_momentum": False, "master_weights": True,
}  # fmt: skip


@on_ranks(2)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", [*OTHER, "dampening"])
def test_another_option(name, later):
    common = {"classic_momentum": False} if name == "dampening" else {}
    optimizer = make(**common)
    usual = optimizer.param_groups[0][name]
    if later:
        optimizer.step()
    other = OTHER.get(name, 0.5)
    if is_one():
        optimizer.param_groups[0][name] = other
    text = re.escape(
        f"rank 1 has {name}={other!r} where rank 0 has {usual!r}, in the group that begins with 'a'"
    )
    assert_raises(optimizer, text)
    # When all ranks agree again, the run goes on as if nothing had happened.
    optimizer.param_groups[0][name] = usual
    optimizer.step()
    reference = make(**common)
    for _ in range(1 + later):
        reference.step()
    assert all(map(torch.equal, values(optimizer), values(reference)))


@on_ranks(2)
@pytest.mark.parametrize("given", ["found_inf", "grad_scale"])
def test_amp_on_one_rank_only(given):
    optimizer = make()
    for later in (False, True):
        if is_one():
            setattr(optimizer, given, torch.zeros(()) if given == "found_inf" else torch.ones(()))
        assert_raises(optimizer, rf"rank 1 has a {given}, unlike rank 0")
        if is_one():
            delattr(optimizer, given)
        if not later:
            optimizer.step()


# ---------------------------------------------------------------- later


@on_ranks(4)
@pytest.mark.parametrize("differing", ["3", "0", "12", "23", "13", "01", "123"])
def test_lr_of_some_ranks(differing):
    """Any ranks that differ show in the sum. The usual lr is that of most ranks, else that of rank 0."""
    optimizer = make()
    for _ in range(2):
        optimizer.step()
    if str(dist.get_rank()) in differing:
        optimizer.param_groups[1]["lr"] = 0.125
    expected = {
        "0": "rank 0 has lr=0.125 where rank 1 has 0.5",
        "01": "rank 2 has lr=0.5 where rank 0 has 0.125, in .*; rank 3 has lr=0.5",
        "123": "rank 0 has lr=0.5 where rank 1 has 0.125",
    }
    others = "; .*".join(f"rank {rank} has lr=0.125 where rank 0 has 0.5, in .*'d'.*" for rank in differing)
    assert_raises(optimizer, expected.get(differing, others))


@on_ranks(4)
def test_all_ranks_differ():
    optimizer = make()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1 * dist.get_rank()
    assert_raises(optimizer, "rank 1 has lr=0.1 .*; rank 2 has lr=0.2 .*; rank 3 has lr=0.3")


@on_ranks(2)
def test_tensor_lr_written_in_place():
    lr = torch.tensor(0.5)
    optimizer = make(lr=lr)
    optimizer.step()
    if is_one():
        lr.fill_(0.25)
    assert_raises(optimizer, "rank 1 has lr=0.25 where rank 0 has 0.5")


@on_ranks(2, 4)
def test_options_that_all_ranks_change():
    """As a scheduler does in every step. Nothing more is sent for it, whatever the options were before."""
    optimizer = make()
    optimizer.step()
    for lr in (0.25, 0.25, 0.125):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.param_groups[0]["momentum"] = 1 - lr
        record = record_step(optimizer)
        assert record.collectives() == {"c10d::allreduce_": 1}
        assert record.reduced == [2 * 5]


@on_ranks(2, 4)
def test_a_group_more_on_one_rank():
    optimizer = make("abc", "")
    optimizer.step()
    [named] = make_params("d")
    if is_one():
        optimizer.add_param_group({"params": [named]})
        text, error = (
            "this rank has other parameters than in the step before, and other ranks have",
            ValueError,
        )
    else:
        text, error = (
            "rank 1 cannot step, so no rank has: ValueError: this rank has other param",
            RuntimeError,
        )
    for _ in range(2):
        set_grads(optimizer)
        assert_raises(optimizer, text, error)
    if not is_one():
        optimizer.add_param_group({"params": [named]})
    set_grads(optimizer)
    optimizer.step()


@on_ranks(2, 4)
def test_a_group_more_on_all_ranks():
    optimizers = [make("abc", ""), make("abc", "")]
    for step in range(3):
        for i, optimizer in enumerate(optimizers):
            if step == i:
                optimizer.add_param_group({"params": make_params("d"), "lr": 0.25 * (1 + step)})
                set_grads(optimizer)
            optimizer.step()
    assert len(optimizers[0].trust_ratios()) == 4


# ---------------------------------------------------------------- an error of one rank


def assert_one_raises(optimizer, match: str) -> None:
    if is_one():
        assert_raises(optimizer, match)
    else:
        assert_raises(optimizer, f"rank 1 cannot step, so no rank has: ValueError: .*{match}", RuntimeError)


def of_another_shape(tensor: DTensor) -> DTensor:
    return DTensor.from_local(torch.ones(7), tensor.device_mesh, tensor.placements, run_check=False)


@on_ranks(2, 4)
@pytest.mark.parametrize("key", ["momentum_buffer", "master_param"])
def test_state_that_does_not_fit(key):
    """Only the step refuses this state. The norms op does not."""
    optimizer = make(dtype=torch.bfloat16, master_weights=key == "master_param")
    optimizer.step()
    state = optimizer.state[params_of(optimizer)[1]]
    right = state[key]
    wrong = "has dtype Double"
    if key == "momentum_buffer":  # a dtype that another option asked for would be converted
        wrong = r"has shape \[7\]"
    if is_one():
        state[key] = right.double() if key == "master_param" else of_another_shape(right)
    for _ in range(2):
        assert_one_raises(optimizer, rf"{key}s\[1\] {wrong}.*'b', param_groups\[0\]\['params'\]\[1\]")
    state[key] = right
    optimizer.step()


@on_ranks(2)
def test_loaded_state_that_does_not_fit():
    """At the first step, with a state_dict that another program wrote."""
    optimizer, other = make(), make()
    other.step()
    state = other.state_dict()
    optimizer.load_state_dict(state)
    if is_one():
        for p in params_of(optimizer):
            optimizer.state[p]["momentum_buffer"] = of_another_shape(optimizer.state[p]["momentum_buffer"])
    assert_one_raises(optimizer, r"momentum_buffers\[0\] has shape \[7\].*'a'")
    optimizer.load_state_dict(state)
    optimizer.step()


@on_ranks(2)
@pytest.mark.parametrize("wrong", ["dtype", "shape", "placement"])
def test_gradient_of_the_wrong_kind(wrong):
    optimizer = make()
    optimizer.step()
    param = params_of(optimizer)[2]
    if is_one():
        local = param.grad.to_local()
        if wrong == "placement":
            param.grad = torch.ones(8, 3)
        else:
            param.grad._local_tensor = {
                "dtype": local.double(),
                "shape": torch.ones(7),
            }[wrong]
    text = "gradient of parameter 'c'" if wrong == "placement" else r"grads\[2\] has .*parameter 'c'"
    assert_one_raises(optimizer, text)
    set_grads(optimizer)
    optimizer.step()


@on_ranks(2)
@pytest.mark.parametrize("lr", ["0.1", None, torch.ones(2)], ids=str)
def test_lr_of_the_wrong_kind(lr):
    optimizer = make()
    for _ in range(2):
        if is_one():
            optimizer.param_groups[0]["lr"] = lr
        error = (ValueError, TypeError, RuntimeError)
        assert_raises(optimizer, "" if is_one() else "rank 1 cannot step, so no rank has", error)
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()


@on_ranks(4)
@pytest.mark.parametrize("layout", ["sharded_over_tensor_parallel", "several_meshes", "hybrid"])
def test_error_of_a_rank_in_several_sets(layout):
    """All ranks that share any parameter with the failing rank raise."""
    model, data = getattr(nets, layout)(make_net())
    optimizer = make_optimizer(model)
    train(model, optimizer, data, steps=2)
    for x, y in nets.batches(1):
        nets.loss_of(model, x, y, data).backward()
    before = [p.detach().to_local().clone() for p in model.parameters()]
    if is_one():
        state = optimizer.state[next(model.parameters())]
        state["momentum_buffer"] = of_another_shape(state["momentum_buffer"])
    beside = layout == "hybrid" and dist.get_rank() in (
        2,
        3,
    )  # the other replica, which shares nothing with it
    if beside:
        optimizer.step()
        return
    error = ValueError if is_one() else RuntimeError
    with pytest.raises(error, match=r"momentum_buffers\[\d+\] has shape \[7\]"):
        optimizer.step()
    assert all(map(torch.equal, before, (p.detach().to_local() for p in model.parameters())))


# ---------------------------------------------------------------- the sum


def fake_peers(monkeypatch, count: int) -> list[peers.Peers]:
    made, ranks = [], tuple(range(count))  # one tuple for all, because 20,000 of that length take 13 GB
    for rank in ranks:
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        made.append(peers.Peers(ranks, (), torch.device("cpu"), None, ["parameter"], [1]))
    return made


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 1000, 1024, 20000])
def test_last_rows_add_up_to_zero_where_digests_are_equal_only(count, monkeypatch):
    """The sum is exact in fp64, in any order. No set of ranks with another digest cancels."""
    ranks = fake_peers(monkeypatch, count)
    for sent, agreed in ((2**32 - 1, 0), (0, 2**32 - 1), (12345, 678)):
        for peer in ranks:
            peer._digest, peer._agreed = sent & peer._mask, agreed & peer._mask
        rows = torch.tensor([peer.last_row() for peer in ranks], dtype=torch.float64)
        assert rows.abs().sum() < 2**50
        assert rows.sum() == 0
        assert sum(rows[torch.randperm(count)].tolist()) == 0
    generator = torch.Generator().manual_seed(count)
    for size in {1, 2, count // 2, count - 1} - {0, count}:
        others = torch.randperm(count, generator=generator)[:size].tolist()
        for peer in ranks:
            peer._digest = peer._agreed = 5
        for other in others:
            ranks[other]._digest = 6
        total = sum(peer.last_row() for peer in ranks)
        assert total != 0
        trouble = ranks[0].message_of_trouble()[-1, 1].item()
        assert abs(total + trouble) > 2**51
