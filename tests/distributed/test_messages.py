"""What a step on DTensors sends and runs: one small all-reduce for each set of ranks, and nothing else."""

import pytest
import torch
import torch.distributed as dist

import distributed_nets as nets
from distributed_harness import on_ranks
from distributed_nets import batches, loss_of, make_net, make_optimizer, train
from step_record import record_step


def with_gradients(layout, **options):
    model, data = getattr(nets, layout)(make_net())
    optimizer = make_optimizer(model, **options)
    train(model, optimizer, data, steps=1)
    for x, y in batches(1):
        loss_of(model, x, y, data).backward()
    return model, optimizer


# How many of the net's 16 parameters each all-reduce is about, by number of ranks.
REDUCED = {
    "replicated": {2: [], 4: []},
    "sharded": {2: [16], 4: [16]},
    "sharded_by_layer": {2: [16], 4: [16]},
    "hybrid": {2: [], 4: [16]},
    "sharded_over_tensor_parallel": {2: [16], 4: [6, 10]},
    "partly_sharded": {2: [12], 4: [12]},
    "several_meshes": {2: [12], 4: [12, 4]},
}


@on_ranks(2, 4)
@pytest.mark.parametrize("layout", REDUCED)
def test_one_all_reduce_for_each_set_of_ranks(layout):
    _, optimizer = with_gradients(layout)
    record = record_step(optimizer)
    expected = REDUCED[layout][dist.get_world_size()]
    assert sorted(record.reduced) == sorted(2 * (n + 1) for n in expected)
    assert record.collectives() == ({"c10d::allreduce_": len(expected)} if expected else {})
    assert record.ops["fused_lars::squared_norms"] == bool(expected)
    assert record.ops["fused_lars::step_"] == 1
    assert not record.on_dtensors


@on_ranks(2)
def test_sequence_parallel_gradients_share_one_reduction():
    """The gradients of the 4 norm parameters are Partial. One message has all, instead of one each."""
    _, optimizer = with_gradients("tensor_parallel")
    partial = [
        p for group in optimizer.param_groups for p in group["params"] if p.grad.placements[0].is_partial()
    ]
    assert len(partial) == 4
    record = record_step(optimizer)
    assert record.collectives() == {"_c10d_functional::all_reduce": 1, "c10d::allreduce_": 1}
    assert all(p.grad.placements[0].is_partial() for p in partial)  # gradients are not rewritten


@on_ranks(2)
def test_found_inf_travels_with_the_norms():
    _, optimizer = with_gradients("sharded")
    optimizer.found_inf = torch.zeros(())
    record = record_step(optimizer)
    assert record.reduced == [2 * 17]
    assert record.collectives() == {"c10d::allreduce_": 1}


@on_ranks(2)
def test_foreach_sends_the_same():
    _, optimizer = with_gradients("sharded", foreach=True)
    record = record_step(optimizer)
    assert record.reduced == [2 * 17]
    assert record.ops["fused_lars::step_"] == 0
    assert not record.on_dtensors


@on_ranks(2)
def test_recorder_sees_dtensor_operators():
    """What the tests above would find in an optimizer that does not unwrap its parameters."""
    model, data = nets.sharded(make_net())
    for x, y in batches(1):
        loss_of(model, x, y, data).backward()
    assert record_step(torch.optim.SGD(model.parameters(), lr=0.1)).on_dtensors
