"""Makes a step outside torch.compile: gathers, checks and makes it, or repeats the last one."""

from ._gather import append_group, gather_calls
from ._masters import WrittenParams, is_captured
from ._op_call import OpCalls
from ._prepared_step import PreparedStep
from ._records import Records
from ._run_call import run_call
from ._step_inputs import StepInputs
from ._workspace import Workspaces


class Stepper:
    """Makes the steps of an optimizer. Nothing that it keeps between steps is in a state_dict."""

    def __init__(self) -> None:
        self.records = Records()
        self.workspaces = Workspaces()
        self.prepared: PreparedStep | None = None
        self._written_params = WrittenParams()

    def repeat(self, inputs: StepInputs) -> bool:
        """Repeats the last step. Returns False, with nothing done, if it is not the right one."""
        prepared, self.prepared = self.prepared, None
        if prepared is None or not prepared.fits(inputs.param_groups, inputs.state):
            return False
        if prepared.has_masters:
            self._written_params.before_step(inputs.param_groups, inputs.state)
        if not prepared.run(inputs.grad_scale, inputs.found_inf):
            return False
        if prepared.has_masters:
            self._written_params.after_step()
        self.prepared = prepared
        return True

    def step(self, inputs: StepInputs, sharding) -> None:
        """Gathers a step and makes it. `sharding` is a Sharding if there are DTensors, else None."""
        gathered = None
        if sharding is None:
            calls = gather_calls(
                inputs.param_groups,
                lambda group, *lists: append_group(group, inputs.param_groups, inputs.state, *lists),
            )
        else:
            sharding.look_at(inputs)
            # Before the norms are taken, because they are norms of the masters.
            self._written_params.before_step(inputs.param_groups, inputs.state)
            gathered = sharding.gather(inputs)
            calls = gathered.calls
        calls = OpCalls({key: call for key, call in calls.items() if call.params})
        has_masters = any(call.lists.master_params for call in calls.values())
        # A replay of a graph runs no code of the host, so the graph itself has to see what was written.
        masters_follow = has_masters and sharding is None and is_captured()
        if has_masters and sharding is None and not masters_follow:
            self._written_params.before_step(inputs.param_groups, inputs.state)
        records = {key: self.records.of_call(key, call.params) for key, call in calls.items()}
        # If a step has several calls, all are checked before the first of them writes.
        for check_only in (True, False) if len(calls) > 1 else (False,):
            for key, call in calls.items():
                workspace = self.workspaces[call.device]
                run_call(call, inputs, records[key], workspace.tensor, check_only, masters_follow)
                workspace.after_use()
        is_repeated = self.records.take(records)
        if sharding is not None:
            sharding.after_step(inputs, gathered)
        if has_masters:
            self._written_params.after_step()
        if is_repeated:
            self.prepared = PreparedStep.of(
                calls, inputs.param_groups, inputs.state, self.records, self.workspaces
            )
