"""Records what a step on DTensors sends and runs."""

from collections import Counter

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class Record(TorchDispatchMode):
    """Counts operators by name, those that get a DTensor, and the elements of every all-reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.reduced, self.on_dtensors = Counter(), [], Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().split(".")[0]
        self.ops[name] += 1
        if name == "c10d::allreduce_":
            self.reduced.append(args[0][0].numel())
        if any(issubclass(t, DTensor) for t in types):
            self.on_dtensors[name] += 1
        return op(*args, **(kwargs or {}))

    def collectives(self) -> dict[str, int]:
        local = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")
        return {name: n for name, n in self.ops.items() if "c10d" in name and name not in local}


def record_step(optimizer) -> Record:
    with Record() as record:
        optimizer.step()
    return record
