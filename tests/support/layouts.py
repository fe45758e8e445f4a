"""Tensors of every layout that a parameter or a gradient may have, inside storage that tests can watch."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Sizes, strides (None: contiguous) and storage offset of a tensor, counted in elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    offset: int = 0

    def place(self, dtype: torch.dtype, device, generator: torch.Generator) -> Tensor:
        """Makes a tensor of this layout. Its storage is larger and filled with normal numbers."""
        strides = self.strides
        if strides is None:
            strides = torch.empty(self.sizes, device="meta").stride()
        last = sum((n - 1) * stride for n, stride in zip(self.sizes, strides)) if 0 not in self.sizes else -1
        storage = torch.randn(self.offset + last + 1 + 3, generator=generator, dtype=torch.float64)
        if dtype == torch.int8:  # codes of 8-bit momentum
            storage = (40 * storage).round().clamp(-127, 127)
        storage = storage.to(dtype).to(device)
        return storage.as_strided(self.sizes, strides, self.offset)

    def dense(self) -> "Layout":
        """The layout without gaps that has the elements in the same order in memory."""
        if self.strides is None:
            return self
        strides, step = [0] * len(self.sizes), 1
        for d in sorted(range(len(self.sizes)), key=self.strides.__getitem__):
            strides[d] = step
            step *= max(self.sizes[d], 1)
        return Layout(self.sizes, tuple(strides), self.offset)


@dataclass(frozen=True)
class Layouts:
    """The layouts of a parameter and of its gradient and state. None: the parameter's layout."""

    param: Layout
    grad: Layout | None = None
    state: Layout | None = None


@cache
def _outside(sizes, strides, offset, storage_size) -> Tensor:
    inside = torch.arange(storage_size).as_strided(sizes, strides, offset).flatten().tolist()
    return torch.tensor(sorted(set(range(storage_size)) - set(inside)), dtype=torch.long)


def outside(tensor: Tensor) -> Tensor:
    """Copies the elements of a tensor's storage that are not the tensor's."""
    tensor = tensor.detach()
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    index = _outside(tensor.shape, tensor.stride(), tensor.storage_offset(), size)
    return tensor.as_strided((size,), (1,), 0)[index.to(tensor.device)]


_IMAGE = (3, 5, 4, 2)
_CHANNELS_LAST = Layout(_IMAGE, (40, 1, 10, 5))
_CONTIGUOUS = Layout(_IMAGE)

LAYOUTS = {
    # Two tiles of the CPU step, and a rest that is not a multiple of any vector width.
    "tiles": Layouts(Layout((8199,))),
    "one tile": Layouts(Layout((4096,))),
    "matrix": Layouts(Layout((7, 11))),
    "one element": Layouts(Layout((1,))),
    "0-dim": Layouts(Layout(())),
    "size 0": Layouts(Layout((0,))),
    "size 0 in a dimension": Layouts(Layout((3, 0, 2))),
    "channels_last": Layouts(_CHANNELS_LAST, _CHANNELS_LAST, _CHANNELS_LAST),
    "channels_last, gradient contiguous": Layouts(_CHANNELS_LAST, _CONTIGUOUS),
    "contiguous, gradient channels_last": Layouts(_CONTIGUOUS, _CHANNELS_LAST),
    "channels_last, state contiguous": Layouts(_CHANNELS_LAST, state=_CONTIGUOUS),
    "transposed": Layouts(Layout((13, 6), (1, 13))),
    "transposed, gradient contiguous": Layouts(Layout((13, 6), (1, 13)), Layout((13, 6))),
    "rows with gaps": Layouts(Layout((6, 5), (9, 1), 2)),
    "column of a matrix": Layouts(Layout((17,), (3,), 1)),
    "gradient with gaps": Layouts(Layout((6, 5)), Layout((6, 5), (9, 1), 2)),
    "state with gaps": Layouts(Layout((6, 5)), state=Layout((6, 5), (9, 1), 2)),
    "all with gaps": Layouts(Layout((6, 5), (9, 1), 2), Layout((6, 5), (7, 1)), Layout((6, 5), (1, 8), 1)),
    "misaligned": Layouts(Layout((4103,), None, 1), Layout((4103,), None, 3), Layout((4103,), None, 1)),
    "only the gradient misaligned": Layouts(Layout((1030,)), Layout((1030,), None, 1)),
    "only the parameter misaligned": Layouts(Layout((1030,), None, 1), Layout((1030,)), Layout((1030,))),
    "expanded gradient": Layouts(Layout((4, 33)), Layout((4, 33), (0, 0))),
    "gradient expanded in a dimension": Layouts(Layout((4, 33)), Layout((4, 33), (1, 0))),
    "gradient that overlaps itself": Layouts(Layout((5, 6)), Layout((5, 6), (2, 1))),
    "strides of dimensions of size 1": Layouts(Layout((1, 9, 1), (7, 1, 5)), Layout((1, 9, 1), (2, 1, 3))),
}
