"""Hooks on tensors that func depends on: they see the gradient of the whole solve, once, not that of each call of func.

Autograd runs a tensor's hooks whenever it hands out the tensor's gradient. On the way back of a solve that happens at every
evaluation, and once more for the sum, which is when they are meant to run.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_task_id = torch._C._current_graph_task_id
_lock = threading.Lock()
_tasks: set[int] = set()  # of autograd, that are products of solves
_quiet = 0  # how many solves on their way back have tensors with hooks


class _Hook:
    """A hook that does not run in products of solves. It stands in the place of the user's; other threads may need that."""

    def __init__(self, hook: Any):
        self.hook, self.users = hook, 0

    def __call__(self, grad: Any) -> Any:
        return None if _task_id() in _tasks else self.hook(grad)


def any_quiet() -> bool:
    return _quiet > 0


class Task:
    """One product. outputs: those given, whose own hooks tell of it before any other runs."""

    def __init__(self, outputs: Sequence[Tensor]):
        self._ids: set[int] = set()
        with torch.enable_grad():
            self.outputs = [x.view_as(x) for x in outputs]
        for x in self.outputs:
            x.register_hook(self._begun)  # runs first

    def _begun(self, grad: Tensor) -> None:
        self._ids.add(_task_id())
        _tasks.add(_task_id())

    def __enter__(self) -> "Task":
        return self

    def __exit__(self, *error: Any) -> None:
        _tasks.difference_update(self._ids)


@contextmanager
def quiet(tensors: Sequence[Tensor]) -> Iterator[None]:
    """In here products of solves run no hooks of these tensors, and do not add to the gradients that they retain."""
    global _quiet
    dicts = [x._backward_hooks for x in tensors if x._backward_hooks]
    retained = [(x, x.grad) for x in tensors if x.grad_fn is not None and x.retains_grad]
    if not dicts and not retained:
        yield
        return
    held: list[tuple[Any, Any, _Hook]] = []
    with _lock:
        _quiet += 1
        for hooks in {id(x): x for x in dicts}.values():
            for key, hook in list(hooks.items()):
                if not isinstance(hook, _Hook):
                    hook = hooks[key] = _Hook(hook)
                hook.users += 1
                held.append((hooks, key, hook))
    try:
        for x, _ in retained:
            x.grad = None
        yield
    finally:
        for x, grad in retained:
            x.grad = grad
        with _lock:
            _quiet -= 1
            for hooks, key, hook in held:
                hook.users -= 1
                if hook.users == 0 and hooks.get(key) is hook:
                    hooks[key] = hook.hook
