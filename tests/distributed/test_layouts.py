"""Every way to spread parameters over ranks trains like one process."""

import pytest

import distributed_nets as nets
from distributed_harness import on_ranks
from distributed_nets import make_net, make_optimizer, train

LAYOUTS = [
    "replicated",
    "sharded",
    "sharded_by_layer",
    "hybrid",
    "tensor_parallel",
    "sharded_over_tensor_parallel",
    "partly_sharded",
    "several_meshes",
]


@on_ranks(2, 4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_as_one_process(layout):
    before, reference = make_net(), make_net()
    train(reference, make_optimizer(reference))
    model, data = getattr(nets, layout)(make_net())
    train(model, make_optimizer(model), data)
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE, nets.errors(model, reference)
    for p, q in zip(before.parameters(), reference.parameters()):
        assert (p - q).norm() > 1e-2 * q.norm()  # there was something to get wrong
