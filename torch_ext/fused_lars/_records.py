"""Records the trust ratio and the norms of every parameter in a step."""

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import NamedTuple  # typing's can be generic from Python 3.11 on

from ._names import name_in_group, place_of

Value = TypeVar("Value", Tensor, float)


class LayerNorms(NamedTuple, Generic[Value]):
    """The L2 norms of a parameter in a step. It becomes a list in JSON, which has no tuples."""

    weight: Value
    grad: Value


class Record:
    """The tensors that a call writes trust ratios and norms to, kept while its parameters are the same."""

    def __init__(self, device: torch.device, params: list[Tensor], param_ids: list[int]) -> None:
        self.params = params
        self.param_ids = param_ids
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.trust_ratios = torch.full((len(params),), torch.nan, dtype=dtype, device=device)
        self.layer_norms = torch.full((len(params), 2), torch.nan, dtype=dtype, device=device)
        self.is_captured = False


class Records(dict[tuple, Record]):
    """The records of the last step, by the keys of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self._captured: list[Record] = []  # captured graphs go on writing to these

    def of_call(self, key, params: list[Tensor]) -> Record:
        """Returns a call's record: that of the last step, or a new one if the parameters differ."""
        device, record = key[0], self.get(key)
        # A repeated call has the same list as before.
        if record is None or record.params is not params:
            ids = [*map(id, params)]
            if record is None or record.param_ids != ids:
                record = Record(device, params, ids)
            record.params = params
        if device.type == "cuda" and not record.is_captured and torch.cuda.is_current_stream_capturing():
            record.is_captured = True
            self._captured.append(record)
        return record

    def take(self, records: dict[tuple, Record]) -> bool:
        """Makes `records` those of the last step, in place, since wrappers may hold this object.

        Returns whether they were those already, which means that the calls have the same parameters.
        """
        is_repeated = records == self
        self.clear()
        self.update(records)
        return is_repeated

    def trust_ratios(self, param_groups, by_name: bool, as_numbers: bool) -> dict[Any, Any]:
        values: dict = {}
        for record in self.values():
            values.update(zip(record.params, _rows(record.trust_ratios, as_numbers)))
        return _named(values, param_groups) if by_name else values

    def layer_norms(self, param_groups, by_name: bool, as_numbers: bool) -> dict[Any, Any]:
        values: dict = {}
        for record in self.values():
            columns = (_rows(column, as_numbers) for column in record.layer_norms.unbind(1))
            values.update(zip(record.params, map(LayerNorms, *columns)))
        return _named(values, param_groups) if by_name else values


def _rows(tensor: Tensor, as_numbers: bool):
    # A copy, since the next step overwrites the tensor.
    return tensor.tolist() if as_numbers else tensor.clone().unbind()


def _named(values: dict, param_groups) -> dict:
    result = {}
    for group_index, group in enumerate(param_groups):
        for index, param in enumerate(group["params"]):
            if param in values:
                result[name_in_group(group, index) or place_of(group_index, index)] = values[param]
    return result
