"""Changes between calls: whatever a field reads may change, and a compiled one gives what a new one would give."""

import warnings
from typing import Any

import pytest
import torch
from changing_fields import SOURCES, STATES, program
from fuzzing import FRESH, distance, examples, largest, tick, weighted
from hypothesis import event, note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor

from odenet_cuda import solve

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # the same steps, so rounding alone; a change may be 1e-6
WRAPS = ("func", "func.forward", "lambda t, y, *args: func(t, y, *args)", "functools.partial(func)")
CHECK = """t, how = [0.0, 0.4], dict(method="rk4", step_size=0.2, args=tuple(args))
print(odenet_cuda.solve(compiled, y0, t, **how).ys[-1] - odenet_cuda.solve(solved, y0, t, **how).ys[-1])
"""


def gradients(name: str, names: dict[str, Any], gradient: str, reads: list[str]) -> list[Tensor | None]:
    """The outputs of a solve and what they give to y0, the arguments, the weights and what the field reads."""
    y0 = names["y0"].detach().clone().requires_grad_(gradient != "none")
    args = tuple([x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in names["args"]])
    found = [eval(read, names) for read in reads]
    wanted = [y0, *args, *names["func"].parameters(), *(x for x in found if isinstance(x, Tensor))]
    wanted = [x for x in wanted if isinstance(x, Tensor) and x.is_leaf and x.requires_grad]
    with torch.set_grad_enabled(gradient != "none"):
        how = {} if gradient == "none" else {"gradient": gradient}
        ys = solve(names[name], y0, [0.0, 0.4], method="rk4", step_size=0.2, args=args, **how).ys
    if gradient == "none":
        return [ys]
    return [ys, *torch.autograd.grad(weighted([ys]), wanted, allow_unused=True)]


class Changes(RuleBasedStateMachine):
    @initialize(
        sources=st.lists(st.sampled_from(range(len(SOURCES))), min_size=1, max_size=3, unique=True),
        wrap=st.sampled_from(WRAPS),
    )
    def begin(self, sources, wrap):
        tick()
        self.sources = [SOURCES[i] for i in sources]
        self.text = program(self.sources, wrap)
        self.names: dict[str, Any] = {}
        exec(self.text, self.names)
        self.reads = [read.replace("@", str(i)) for i, source in enumerate(self.sources) for read in source.reads]
        self.check("none")

    @rule(which=st.integers(0, 2), change=st.integers(0, 30), gradient=st.sampled_from(["none", "direct", "adjoint"]))
    def change(self, which, change, gradient):
        which %= len(self.sources)
        changes = self.sources[which].changes
        if changes:
            self.run(changes[change % len(changes)].replace("@", str(which)), gradient)

    @rule(state=st.sampled_from(STATES), gradient=st.sampled_from(["none", "direct", "adjoint"]))
    def state(self, state, gradient):
        self.run(state.replace("compile(func)", "compile(solved)"), gradient)

    def run(self, statement, gradient):
        try:
            exec(statement, self.names)
        except Exception:  # does not fit what other changes have made
            return
        self.text += CHECK + statement + "\n"
        self.check(gradient)

    def check(self, gradient):
        names = self.names
        try:
            found: Any = gradients("compiled", names, gradient, self.reads)
        except Exception as error:
            found = error
        why = names["compiled"].explain()
        try:
            right = gradients("solved", names, gradient, self.reads)
        except Exception as error:
            assert isinstance(found, type(error)), f"{found!r} where func itself raises {error!r}\n{self.text}"
            return
        event("compiled" if why == "compiled" else "served by the stepper")
        if isinstance(found, Exception):
            note(self.text + CHECK)
            raise found
        gap, scale = distance(found, right), 1 + largest(right)
        if gap > TOLERANCE[names["y0"].dtype] * scale:
            note(self.text + CHECK)
            raise AssertionError(f"off by {gap:.1e}, gradient={gradient}, {why}")


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    """It is not the compiler that is tried here. A compiled field that does not pass its own check is a fault."""
    monkeypatch.setenv("ODENET_CXXFLAGS", "-O0")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compiled field is wrong.*")
        yield


def test_changes():
    run_state_machine_as_test(Changes, settings=examples(short=3, fresh=25, steps=8 if FRESH else 4))
