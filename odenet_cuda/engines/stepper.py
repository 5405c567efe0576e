"""Any func, by the step loops over fused kernels."""

from functools import partial

from .. import recorded
from ..compiled.plans import undisturbed
from ..request import Request
from ..solution import Solution

NAME = "stepper"


def refusal(request: Request) -> str:
    return ""


def solve(request: Request) -> Solution:
    run = partial(recorded.solve, request)
    return run() if request.compiled is None else undisturbed(run)
