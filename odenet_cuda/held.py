"""What a solve needs again on its way back: the tensors that func depends on, and those that its modules held.

Between the two a module may have got other tensors: `torch.func.functional_call` lends it weights for one call alone, and
`parametrize.cached` keeps them for a block of code. The gradient is that of what was solved.
"""

import functools
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .hooks import quiet
from .problem import WithArguments

Place = tuple[dict[str, Any], str, Tensor]


def modules_of(func: Any) -> list[nn.Module]:
    """The modules that func is or is made from: func itself, what it is a method of, what it closes over or names, its
    attributes, and all modules of those."""
    found: dict[int, nn.Module] = {}
    seen: dict[int, Any] = {}
    waiting = [func]
    while waiting:
        x = waiting.pop()
        if isinstance(x, nn.Module):
            if id(x) not in found:
                found[id(x)] = x
                waiting.extend(module for module in x._modules.values() if module is not None)
        elif id(x) not in seen:
            seen[id(x)] = x  # so that no other gets its id
            waiting.extend(_parts(x, x is func or isinstance(x, _CALLED)))
    return list(found.values())


_CALLED = (types.FunctionType, types.MethodType, functools.partial, WithArguments)


def _parts(x: Any, called: bool) -> Sequence[Any]:
    """What x may hold modules in. called: by func, which then uses its attributes too."""
    if isinstance(x, types.FunctionType):
        cells = [_content(cell) for cell in x.__closure__ or ()]
        named = [x.__globals__.get(name) for name in x.__code__.co_names]
        return [*cells, *(x.__defaults__ or ()), *(v for v in named if isinstance(v, (nn.Module, *_CALLED)))]
    if isinstance(x, types.MethodType):
        return x.__func__, x.__self__, *_attributes(x.__self__)
    if isinstance(x, functools.partial):
        return x.func, *x.args, *x.keywords.values()
    if isinstance(x, WithArguments):
        return x._func, *x._args
    if isinstance(x, (list, tuple)):
        return [v for v in x if isinstance(v, (nn.Module, *_CALLED))]
    if isinstance(x, dict):
        return [v for v in x.values() if isinstance(v, (nn.Module, *_CALLED))]
    return _attributes(x) if called else ()


def _attributes(x: Any) -> Sequence[Any]:
    if isinstance(x, (nn.Module, type, types.ModuleType)):
        return ()
    return list(getattr(x, "__dict__", {}).values())


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def _places(modules: Sequence[nn.Module]) -> list[Place]:
    places: list[Place] = []
    for module in modules:
        attributes = module.__dict__
        for place in (attributes.get("_parameters"), attributes.get("_buffers")):
            if isinstance(place, dict):  # not a ScriptModule's
                places += [(place, name, x) for name, x in place.items() if x is not None]
        own = attributes.keys() - _OF_EVERY_MODULE
        places += [(attributes, name, attributes[name]) for name in own if isinstance(attributes[name], Tensor)]
    return places


class Captured:
    """The tensors outside of func that a solve gives gradients to, and the tensors that its modules held at its end.

    Of what has a graph only the captured tensors are kept: the rest would keep all earlier solves alive.
    """

    def __init__(self, tensors: Sequence[Tensor], func: Any):
        self.tensors = list(tensors)
        self.versions = [x._version for x in tensors]
        own = {id(x) for x in tensors}
        self.places = [place for place in _places(modules_of(func)) if place[2].grad_fn is None or id(place[2]) in own]

    def check(self) -> None:
        """Raises RuntimeError, as torch does, where a captured tensor was changed since the solve. To be called where func is
        called again; what the graphs of its calls hold, they look after themselves."""
        for x, version in zip(self.tensors, self.versions, strict=True):
            if not x.requires_grad:
                raise RuntimeError(
                    f"a tensor that func depends on, of shape {list(x.shape)}, required a gradient at the solve and does not "
                    "now, but func is called again for the gradient: freeze it after the backward pass, or use "
                    "gradient='direct'"
                )
            if x._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
                    f"that func depends on, of shape {list(x.shape)}, is at version {x._version}; expected version {version}"
                )

    @contextmanager
    def again(self) -> Iterator[None]:
        """In here modules hold what they held at the end of the solve, and hooks of the captured tensors wait for the sum."""
        others = [(place, name, place[name]) for place, name, x in self.places if place.get(name, x) is not x]
        swapped = {(id(place), name) for place, name, _ in others}
        for place, name, x in self.places:
            if (id(place), name) in swapped:
                place[name] = x
        try:
            with quiet(self.tensors):
                yield
        finally:
            for place, name, x in others:
                place[name] = x
