"""What stands on the CPU for a device that the host runs ahead of, and for its graphs."""

import threading
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from odenet_cuda import _C
from odenet_cuda.graphed import capture as capturing
from odenet_cuda.graphed import loops, way_back
from odenet_cuda.graphed.capture import Graphs
from odenet_cuda.solvers import adaptive
from odenet_cuda.step_control import RUNNING


class Capture:
    """Stands for a graph: a replay makes the step again. captured: how many steps were captured, replayed: how many made."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, step, device):
        self.captured += 1

        def replay():
            self.replayed += 1
            step()

        return replay

    def repeat(self, step, status):
        """Stands for a graph that repeats the step."""
        self.captured += 1

        def launch():
            self.replayed += 1
            for _ in range(capturing._STEPS_A_LAUNCH):
                if not (status == RUNNING).any():
                    break
                step()

        return launch


class Operations(TorchDispatchMode):
    """Lists the operations of torch, with the tensors they were done on. The launches of our kernels are listed among them."""

    now = threading.local()  # listing: that of the graph that this thread makes

    def __init__(self):
        super().__init__()
        self.listing = []

    def __enter__(self):
        Operations.now.listing = self.listing
        return super().__enter__()

    def __exit__(self, *error):
        Operations.now.listing = None
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.listing.append(partial(self.again, func, args, kwargs or {}, out))
        return out

    @staticmethod
    def again(func, args, kwargs, out):
        """The operation, with its result where it was then."""
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if func._schema.is_mutable:
            func(*args, **kwargs)
        elif any(x.untyped_storage().data_ptr() not in given for x in made):  # no view
            for x, new in zip(made, tree_leaves(func(*args, **kwargs)), strict=True):
                x.detach().copy_(new)


class Kernels:
    """The kernels of a step. What is bound and launched while a graph is made is listed."""

    native = _C.Stepper

    def __init__(self, **arguments):
        self._own = Kernels.native(**arguments)

    def __getattr__(self, name):
        call = getattr(self._own, name)

        def listed(*args):
            if getattr(Operations.now, "listing", None) is not None:
                Operations.now.listing.append(partial(call, *args))
            return call(*args)

        return listed


class Graph(Capture):
    """Stands for a graph more closely: a replay does what was done then, on the memory it was done on, without Python.

    What a step does is seen when it is replayed for the first time.
    """

    def __call__(self, step, device):
        self.captured += 1
        listing = []

        def replay():
            self.replayed += 1
            if listing:
                with torch.no_grad():
                    for call in listing:
                        call()
                return
            with capturing.no_cast_is_kept(), Operations() as operations:  # as while a graph is captured
                step()
            listing.extend(operations.listing)

        return replay

    def repeat(self, step, status):
        replay = self(step, status.device)

        def launch():
            for _ in range(capturing._STEPS_A_LAUNCH):
                if not (status == RUNNING).any():
                    break
                replay()

        return launch


def run_ahead(monkeypatch: Any, capture: Capture) -> Capture:
    """The host runs ahead, as it does on CUDA; what is captured and replayed is counted."""
    monkeypatch.setattr(adaptive, "runs_ahead", lambda device: True)
    monkeypatch.setattr("odenet_cuda.integrate.runs_ahead", lambda device: True)
    monkeypatch.setattr("odenet_cuda.engines.graphed.runs_ahead", lambda device: True)
    if isinstance(capture, Graph):
        monkeypatch.setattr(_C, "Stepper", Kernels)
    monkeypatch.setattr(capturing, "capture", capture)
    monkeypatch.setattr(capturing, "repeat", capture.repeat)
    monkeypatch.setattr(capturing, "graphs", Graphs())
    for module in (loops, way_back):
        monkeypatch.setattr(module, "graphs", capturing.graphs)
    return capture
