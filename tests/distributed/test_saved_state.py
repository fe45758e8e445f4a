"""A saved run goes on: on as many ranks or on fewer, on a model made on meta, from a copy."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import distributed_nets as nets
from distributed_harness import on_ranks, run_on_ranks
from distributed_nets import full, make_net, make_optimizer, relative_to_all, train

OPTIONS = {
    "classic": {},
    "torch": {"classic_momentum": False, "dampening": 0.5},
    "masters": {"master_weights": True},
}


def make(layout: str | None, options: str):
    net = make_net(torch.bfloat16 if options == "masters" else torch.float32)
    model, data = (net, (0, 1)) if layout is None else getattr(nets, layout)(net)
    return model, make_optimizer(model, **OPTIONS[options]), data


def values(model, optimizer) -> list[torch.Tensor]:
    """All tensors that a run consists of, as whole tensors."""
    tensors = []
    for p in model.parameters():
        tensors.append(full(p.detach()).clone())
        tensors += [full(optimizer.state[p][key]).clone() for key in sorted(optimizer.state[p])]
    return tensors


def train_bfloat16(model, optimizer, data, steps, first=0) -> None:
    for x, y in nets.batches(steps, first):
        nets.loss_of(model, x.to(next(model.parameters()).dtype), y, data).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(layout, options, directory):
    """Trains 5 steps, saves, trains 5 more; returns both states."""
    model, optimizer, data = make(layout, options)
    train_bfloat16(model, optimizer, data, steps=5)
    at_save = values(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)
    train_bfloat16(model, optimizer, data, steps=5, first=5)
    return at_save, values(model, optimizer)


def resume(layout, options, directory):
    model, optimizer, data = make(layout, options)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    checkpoint.load(state, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for p in model.parameters():
        for key, tensor in optimizer.state[p].items():
            if key != "step" and isinstance(p, DTensor):
                assert tensor.placements == p.placements
    at_load = values(model, optimizer)
    train_bfloat16(model, optimizer, data, steps=5, first=5)
    return at_load, values(model, optimizer)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ["sharded", "hybrid", "tensor_parallel", "sharded_over_tensor_parallel"])
def test_saved_on_4_ranks(layout, options, tmp_path):
    saved, uninterrupted = run_on_ranks(4, save, layout=layout, options=options, directory=str(tmp_path))[0]
    for ranks, other_layout in ((4, layout), (2, layout), (2, "replicated"), (1, None)):
        arguments = {"layout": other_layout, "options": options, "directory": str(tmp_path)}
        loaded, resumed = run_on_ranks(ranks, resume, **arguments)[0] if ranks > 1 else resume(**arguments)
        assert all(map(torch.equal, loaded, saved))
        if ranks == 4:
            assert all(map(torch.equal, resumed, uninterrupted))
        else:
            # bf16 gradients of other parts of a batch add up to other bf16 sums.
            tolerance = 2**-3 if options == "masters" else nets.TOLERANCE
            off = relative_to_all(dict(enumerate(zip(resumed, uninterrupted))))
            assert max(off.values()) <= tolerance


@on_ranks(2, 4)
@pytest.mark.parametrize("foreach", [False, True])
def test_state_dict_on_meta(foreach):
    """The model gets its values later, when a checkpoint is loaded."""
    model, data = nets.sharded(make_net())
    optimizer = make_optimizer(model, foreach=foreach)
    train(model, optimizer, data, steps=2)
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    with torch.device("meta"):
        resumed = nets.Net()
    fully_shard(resumed)
    other = make_optimizer(resumed, foreach=foreach)
    on_meta = get_optimizer_state_dict(resumed, other)
    assert on_meta["state"].keys() == saved[1]["state"].keys()
    assert all(state["momentum_buffer"].device.type == "meta" for state in on_meta["state"].values())
    resumed.to_empty(device="cpu")
    set_state_dict(resumed, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    train(model, optimizer, data, steps=2, first=2)
    train(resumed, other, data, steps=2, first=2)
    assert all(map(torch.equal, *([full(p.detach()) for p in m.parameters()] for m in (model, resumed))))


@on_ranks(2)
def test_pickled_state():
    """The result of __getstate__, which copy and pickle use, is enough to go on with."""
    states = []
    for pickled in (False, True):
        model, data = nets.sharded(make_net())
        optimizer = make_optimizer(model)
        train(model, optimizer, data, steps=1)
        if pickled:
            optimizer = copy.copy(optimizer)
        train(model, optimizer, data, steps=1, first=1)
        states.append([full(p.detach()) for p in model.parameters()])
    assert all(map(torch.equal, *states))
