"""Momentum in few bits and stochastic rounding of sharded and replicated parameters."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import distributed_nets as nets
from distributed_harness import on_ranks, run_on_ranks
from distributed_nets import full, make_net, relative_to_all
from fused_lars import LARS
from stepping import same_bits

F32, BF16 = torch.float32, torch.bfloat16
SEED = 3

# Rows whose elements begin in the middle of a draw of random bits or of a block of scales, rows for some of
# the ranks only, several blocks in a shard, and one dimension.
SHAPES = [(7, 3), (2, 5), (40, 33), (6, 4, 5), (50,)]
OPTIONS = dict(lr=0.3, momentum=0.9, weight_decay=0.1, trust_coefficient=0.1, rounding_seed=SEED)

# The dtype of parameters and options.
KINDS = {
    "bf16 momentum": (F32, {"momentum_dtype": BF16}),
    "bf16 weights": (BF16, {"stochastic_rounding": True}),
    "bf16 weights, int8 momentum": (BF16, {"stochastic_rounding": True, "momentum_dtype": "int8"}),
    "int8 momentum": (F32, {"momentum_dtype": "int8"}),
    "masters, int8 momentum": (BF16, {"master_weights": True, "momentum_dtype": "int8"}),
}
WITHOUT_BLOCKS = [kind for kind, (_, options) in KINDS.items() if options.get("momentum_dtype") != "int8"]


def tensors(seed: int, dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def shard(values, placements=None, mesh=None):
    mesh, placements = mesh or init_device_mesh("cpu", (dist.get_world_size(),)), placements or [Shard(0)]
    return [distribute_tensor(value, mesh, placements) for value in values]


def params_of(optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def make(kind: str, place=lambda values: values, **options) -> LARS:
    dtype, of_kind = KINDS[kind]
    params = [nn.Parameter(p) for p in place(tensors(0, dtype))]
    return LARS(params, **{**OPTIONS, **of_kind, **options})


def train(optimizer, steps, place=lambda values: values) -> None:
    params = params_of(optimizer)
    for step in steps:
        for p, grad in zip(params, place(tensors(100 + step, params[0].dtype))):
            p.grad = grad
        optimizer.step()


def momentum_of(optimizer) -> list[torch.Tensor]:
    return [full(values["momentum_buffer"]) for values in optimizer.state_dict()["state"].values()]


# ---------------------------------------------------------------- any number of ranks


@on_ranks(1, 2, 3)
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("kind", WITHOUT_BLOCKS)
def test_shards_of_rows_have_the_bits_of_the_whole(kind, implementation):
    """Without norms, which are added up in another order, no bit depends on the number of ranks."""
    options = {"layer_adaptation": False, implementation: True}
    sharded, whole = make(kind, shard, **options), make(kind, **options)
    train(sharded, range(5), shard)
    train(whole, range(5))
    for p, q in zip(params_of(sharded), params_of(whole)):
        assert same_bits(full(p.detach()), q)
        assert same_bits(full(sharded.state[p]["momentum_buffer"]), whole.state[q]["momentum_buffer"])
        rng, expected = (o.state[t]["rng_state"].tolist() for o, t in ((sharded, p), (whole, q)))
        assert rng[:2] == expected[:2]


@on_ranks(2, 3)
@pytest.mark.parametrize("placements", [(Shard(0),), (Shard(1),)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_trains_as_one_process(kind, placements):
    """Also with shards that are no rows, as in tensor parallelism. They have random bits of their own."""

    def place(values):
        return [d for v in values for d in shard([v], placements if v.dim() > 1 else (Shard(0),))]

    sharded, whole = make(kind, place), make(kind)
    train(sharded, range(6), place)
    train(whole, range(6))
    dtype, options = KINDS[kind]
    pairs = zip(params_of(sharded), params_of(whole))
    off = relative_to_all({i: (full(p.detach()), q.detach()) for i, (p, q) in enumerate(pairs)})
    # 6 roundings of a bf16 weight by at most a unit of 2^-7, or a few of momentum, of which a step takes 0.1.
    assert max(off.values()) < (6 * 2.0**-7 if dtype == BF16 else 2.0**-7)
    blocks_of = [(p.to_local().numel() + 127) // 128 for p in params_of(sharded)]
    for p, blocks in zip(params_of(sharded), blocks_of):
        state = sharded.state[p]
        assert state["momentum_buffer"].placements == p.placements
        assert state["momentum_buffer"].shape == p.shape
        if options.get("momentum_dtype") == "int8":
            assert state["momentum_scale"].shape == (blocks,)
            assert not isinstance(state["momentum_scale"], DTensor)


@on_ranks(2)
def test_shards_share_no_random_bits():
    """Every shard holds the same values. Only random bits make their momentum differ."""
    mesh = init_device_mesh("cpu", (2,))
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    for placement in (Shard(0), Shard(1)):
        local = values.view(10, 20)
        param = nn.Parameter(DTensor.from_local(torch.ones(10, 20), mesh, [placement], run_check=False))
        optimizer = LARS([param], lr=1.0, momentum=0.9, momentum_dtype=BF16)
        param.grad = DTensor.from_local(local, mesh, [placement], run_check=False)
        optimizer.step()
        first, second = full(optimizer.state[param]["momentum_buffer"]).chunk(2, placement.dim)
        assert (first != second).float().mean() > 0.2


def all_equal(tensor) -> bool:
    """Whether all ranks have the same tensor."""
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor.contiguous())
    return all(torch.equal(tensor, other) for other in everyone)


@on_ranks(2)
@pytest.mark.parametrize("kind", KINDS)
def test_replicated_dtensors_stay_equal(kind):
    def place(values):
        return shard(values, (Replicate(),))

    replicated, whole = make(kind, place), make(kind)
    train(replicated, range(4), place)
    train(whole, range(4))
    for p, q in zip(params_of(replicated), params_of(whole)):
        assert same_bits(p.to_local(), q)
        for name, value in whole.state[q].items():
            local = replicated.state[p][name]
            local = local.to_local() if isinstance(local, DTensor) else local
            assert same_bits(local, value), name
            assert all_equal(local)


@on_ranks(4)
@pytest.mark.parametrize("kind", KINDS)
def test_replicas_of_shards_stay_equal(kind):
    """As with HSDP: two replicas of two shards."""
    mesh = init_device_mesh("cpu", (2, 2))

    def place(values):
        return shard(values, (Replicate(), Shard(0)), mesh)

    optimizer = make(kind, place)
    train(optimizer, range(4), place)
    for p in params_of(optimizer):
        for value in (p.detach(), *optimizer.state[p].values()):
            local = value.to_local() if isinstance(value, DTensor) else value
            other = local.clone() if mesh.get_local_rank(0) == 0 else torch.empty_like(local)
            dist.broadcast(other, group=mesh.get_group(0), group_src=0)
            assert torch.equal(local, other)


def train_net(model, optimizer, data, steps, first=0) -> None:
    dtype = next(model.parameters()).dtype
    for x, y in nets.batches(steps, first):
        nets.loss_of(model, x.to(dtype), y, data).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_net_and_optimizer(layout, kind):
    dtype, options = KINDS[kind]
    net = make_net(dtype)
    model, data = (net, (0, 1)) if layout is None else getattr(nets, layout)(net)
    return model, nets.make_optimizer(model, rounding_seed=SEED, **options), data


@on_ranks(2)
@pytest.mark.parametrize("kind", KINDS)
def test_replicas_under_ddp_stay_equal(kind):
    model, optimizer, data = make_net_and_optimizer("replicated", kind)
    train_net(model, optimizer, data, 4)
    for p in model.parameters():
        assert all(map(all_equal, (p.detach(), *optimizer.state[p].values())))


# ---------------------------------------------------------------- saved runs


def values(model, optimizer) -> list[torch.Tensor]:
    """Parameters and state, as whole tensors, and without what depends on the number of ranks."""
    whole = [full(p.detach()).clone() for p in model.parameters()]
    whole += [full(v).clone() for v in _saved_state(optimizer, "momentum_buffer")]
    return whole + [rng[:2].clone() for rng in _saved_state(optimizer, "rng_state")]


def _saved_state(optimizer, name: str) -> list[torch.Tensor]:
    return [state[name] for state in optimizer.state_dict()["state"].values()]


def save(layout, kind, directory):
    """Trains 3 steps, saves, and trains 2 more. Returns both states."""
    model, optimizer, data = make_net_and_optimizer(layout, kind)
    train_net(model, optimizer, data, 3)
    at_save = values(model, optimizer)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    checkpoint.save(states, checkpoint_id=directory)
    train_net(model, optimizer, data, 2, first=3)
    return at_save, values(model, optimizer)


def resume(layout, kind, directory):
    model, optimizer, data = make_net_and_optimizer(layout, kind)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    checkpoint.load(states, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    at_load = values(model, optimizer)
    for p in model.parameters():
        _check_local_state(p, optimizer.state[p], kind)
    train_net(model, optimizer, data, 2, first=3)
    return at_load, values(model, optimizer)


def _check_local_state(param, state, kind) -> None:
    local = param.to_local() if isinstance(param, DTensor) else param
    first = 0
    if isinstance(param, DTensor):
        rows = -(-param.shape[0] // dist.get_world_size())  # of all ranks but the last ones
        first = min(rows * dist.get_rank(), param.shape[0]) * (param.numel() // param.shape[0])
    assert state["rng_state"][2].item() == first
    if KINDS[kind][1].get("momentum_dtype") == "int8":
        assert state["momentum_buffer"].dtype == torch.int8
        assert state["momentum_scale"].shape == ((local.numel() + 127) // 128,)


@pytest.mark.parametrize("kind", ["bf16 momentum", "bf16 weights, int8 momentum", "int8 momentum"])
def test_saved_on_2_ranks(kind, tmp_path):
    """The same number of ranks goes on with the same bits. Another shards the state anew."""
    arguments = {"kind": kind, "directory": str(tmp_path)}
    saved, uninterrupted = run_on_ranks(2, save, layout="sharded", **arguments)[0]
    for ranks in (2, 3, 1):
        if ranks == 1:
            loaded, resumed = resume(None, **arguments)
        else:
            loaded, resumed = run_on_ranks(ranks, resume, layout="sharded", **arguments)[0]
        for got, expected in zip(loaded, saved, strict=True):
            if ranks == 2 or "int8" not in kind or not got.is_floating_point():
                assert torch.equal(got, expected)
            else:  # other blocks
                assert (got - expected).abs().max() <= 0.51 * 2 / 127 * expected.abs().max()
        if ranks == 2:
            assert all(map(torch.equal, resumed, uninterrupted))


@on_ranks(2)
@pytest.mark.parametrize("full_state_dict", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_state_dicts_of_a_model(kind, full_state_dict):
    """get_optimizer_state_dict and back. It makes state of an optimizer that has none."""
    model, optimizer, data = make_net_and_optimizer("sharded", kind)
    train_net(model, optimizer, data, 3)
    options = StateDictOptions(full_state_dict=full_state_dict)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    for state in saved["state"].values():
        assert "momentum_scale" not in state
        assert state["momentum_buffer"].is_floating_point()
        assert isinstance(state["momentum_buffer"], DTensor) != full_state_dict
    other_model, other, _ = make_net_and_optimizer("sharded", kind)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other_model.parameters()):
            q.to_local().copy_(p.to_local())
    set_optimizer_state_dict(other_model, other, saved, options=options)
    for m, o in ((model, optimizer), (other_model, other)):
        train_net(m, o, data, 2, first=3)
    for p, q in zip(model.parameters(), other_model.parameters()):
        assert same_bits(p.to_local(), q.to_local())
        for name, value in optimizer.state[p].items():
            local, expected = (
                t.to_local() if isinstance(t, DTensor) else t for t in (other.state[q][name], value)
            )
            # What was decoded is encoded in the blocks of the local shard again.
            assert same_bits(local, expected), name


@on_ranks(2)
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_on_meta(kind):
    """The model gets its values later, when a checkpoint is loaded."""
    dtype, options = KINDS[kind]
    model, optimizer, data = make_net_and_optimizer("sharded", kind)
    train_net(model, optimizer, data, 2)
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    with torch.device("meta"):
        resumed = nets.Net().to(dtype)
    fully_shard(resumed, mesh=nets.mesh_1d())
    other = nets.make_optimizer(resumed, rounding_seed=SEED, **options)
    on_meta = get_optimizer_state_dict(resumed, other)
    assert on_meta["state"].keys() == saved[1]["state"].keys()
    resumed.to_empty(device="cpu")
    set_state_dict(resumed, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    train_net(model, optimizer, data, 2, first=2)
    train_net(resumed, other, data, 2, first=2)
    for p, q in zip(model.parameters(), resumed.parameters()):
        assert same_bits(full(p.detach()), full(q.detach()))


# ---------------------------------------------------------------- steps


@on_ranks(2)
def test_a_dtype_that_changes_between_steps():
    """A step that is repeated notices, and blocks are those of the local shard."""
    optimizer = make("bf16 momentum", shard, layer_adaptation=False)
    train(optimizer, range(3), shard)
    for target in ("int8", F32, BF16, "int8", None):
        before = momentum_of(optimizer)
        optimizer.param_groups[0].update(momentum_dtype=target, lr=0.0)
        train(optimizer, range(1), shard)
        for p, old, new in zip(params_of(optimizer), before, momentum_of(optimizer)):
            state = optimizer.state[p]
            assert state["momentum_buffer"].dtype == {"int8": torch.int8, None: F32}.get(target, target)
            assert state["momentum_buffer"].placements == p.placements
            assert ("momentum_scale" in state) == (target == "int8")
            unit = {"int8": 2 / 127, BF16: 2.0**-7}.get(target, 2.0**-22)
            assert (new.float() - 0.9 * old.float()).abs().max() <= 1.51 * unit * old.float().abs().max()


@on_ranks(2)
def test_a_shard_without_elements_has_state():
    """Row 0 of a parameter of one row is on rank 0."""
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(1, 9), mesh, [Shard(0)]))
    optimizer = LARS([param], **OPTIONS, momentum_dtype="int8")
    for _ in range(2):
        param.grad = distribute_tensor(torch.full((1, 9), 0.5), mesh, [Shard(0)])
        optimizer.step()
    state = optimizer.state[param]
    has_row = dist.get_rank() == 0
    assert state["momentum_scale"].shape == (1 if has_row else 0,)
    assert state["rng_state"].tolist() == [SEED << 32, 2, 0 if has_row else 9]
    resumed = LARS([param], **OPTIONS, momentum_dtype="int8")
    resumed.load_state_dict(optimizer.state_dict())
    assert same_bits(resumed.state[param]["momentum_buffer"].to_local(), state["momentum_buffer"].to_local())
