"""One call of func that watches whether values reach Python: such numbers would stand in the program for ever.

The time, the state and arguments are given as tensors that have no memory of their own, so that nothing but torch's operations
can read them. Tensors of func are the user's; where Python reads values of those, it is noted which.
"""

import traceback
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from .memory import has_memory
from .picked import Picked


class Leak(Exception):
    """Python read a value of the time, the state or an argument. raised: all of one call, for func may catch some."""

    raised: ClassVar[list["Leak"]] = []

    def __init__(self, *words: Any):
        super().__init__(*words)
        Leak.raised.append(self)


class Tracked(torch.Tensor):
    """A tensor whose numbers only operations of torch can read."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor):
        out = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=inner.device,
        )
        torch._C._set_throw_on_mutable_data_ptr(out)
        out.held = inner
        return out

    def __init__(self, inner: Tensor):
        pass

    def _leak(self, *args: Any, **kwargs: Any) -> Any:
        raise Leak("its values leave torch")

    # What reads numbers, or which tensor this is, without an operation of torch
    __repr__ = __reduce_ex__ = __dlpack__ = data_ptr = untyped_storage = storage = __format__ = _leak  # type: ignore
    numpy = tolist = __array__ = __hash__ = _leak  # type: ignore

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        inner_args, inner_kwargs = tree_map_only(Tracked, lambda x: x.held, (args, kwargs or {}))
        out = func(*inner_args, **inner_kwargs)
        if not all(isinstance(x, Tensor) or x is None for x in tree_leaves(out)) and "sym_" not in str(func):
            raise Leak(f"{str(func).removeprefix('aten.')} gives a value to Python")
        given = [x for x in tree_leaves((inner_args, inner_kwargs)) if isinstance(x, Tensor)]
        if isinstance(out, Tensor) and not func._schema.is_mutable and not any(_shares(out, x) for x in given):
            return Tracked(out)  # `to` may give a view, and may not
        return return_and_correct_aliasing(func, args, kwargs or {}, tree_map_only(Tensor, Tracked, out))


# Methods of a tensor that give its numbers to Python without an operation that the dispatcher sees.
_READS = (
    "numpy", "tolist", "__array__", "data_ptr", "storage", "untyped_storage", "_typed_storage", "__dlpack__", "__reduce_ex__",
    "__deepcopy__", "__repr__", "__format__",
)  # fmt: skip


class Observed(TorchDispatchMode):
    """used: tensors from outside that operations took, by id. read: those whose values, or what was computed from them, Python
    read or shapes depended on. drawn: random numbers."""

    def __init__(self, known: dict[int, Tensor]):
        super().__init__()
        self.used: dict[int, Tensor] = {}
        self.read: dict[int, Tensor] = {}
        self._known = known
        self._stored: dict[int, dict[int, Tensor]] = {}  # those that lie in the same memory
        for x in known.values():
            if has_memory(x):
                self._stored.setdefault(x.untyped_storage().data_ptr(), {})[id(x)] = x
        self._sources: dict[int, dict[int, Tensor]] = {}
        self._tainted: set[int] = set()  # memory that tracked values were written into
        self._alive: list[Tensor] = []  # so that no other tensor gets the id of one
        self.operations = 0
        self.taken: dict[int, int] = {}  # tensors that operations took, and which was the last

    def sources(self, x: Tensor) -> dict[int, Tensor]:
        """The tensors from outside that the values of this one come from; with the key 0, it holds tracked values."""
        if self._tainted and has_memory(x) and x.untyped_storage().data_ptr() in self._tainted:
            return {0: x}
        if id(x) in self._sources:
            return self._sources[id(x)]
        if id(x) in self._known:
            return {id(x): x}
        return self._stored.get(x.untyped_storage().data_ptr(), {}) if has_memory(x) else {}

    def note_read(self, x: Tensor) -> None:
        self._note(self.sources(x))

    def _note(self, found: dict[int, Tensor]) -> None:
        if 0 in found:
            raise Leak("values leave torch by a tensor that they were written into")
        self.read.update(found)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        func = _ZEROS if func is _WITHOUT_MEMORY else func
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.operations += 1
        self.taken.update({id(x): self.operations for x in inputs})
        if any(isinstance(x, Tracked) for x in inputs):
            for x in inputs:
                if not isinstance(x, Tracked):
                    self._use(x)
            for argument, x in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                if written and isinstance(x, Tensor) and has_memory(x):
                    self._tainted.add(x.untyped_storage().data_ptr())
                    self._alive.append(x)
            return out
        found: dict[int, Tensor] = {}
        for x in inputs:
            self._use(x)
            found.update(self.sources(x))
        results = tree_leaves(out)
        tags = getattr(func, "tags", ())
        if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags or _masked(func, args):
            self._note(found)
        for x in results:
            if isinstance(x, Tensor):
                if id(x) not in self._sources:
                    self._sources[id(x)] = dict(found)
                    self._alive.append(x)
            elif x is not None:
                self._note(found)
        return out

    def _use(self, x: Tensor) -> None:
        if id(x) not in self._sources:
            self.used[id(x)] = x


_ZEROS, _WITHOUT_MEMORY = torch.ops.aten.zeros.default, torch.ops.aten._efficientzerotensor.default


def _masked(func: Any, args: Sequence[Any]) -> bool:
    """Whether this takes entries by a mask, so that a shape depends on its values."""
    return "index" in str(func) and any(
        isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1:2])
    )


def _shares(x: Tensor, y: Tensor) -> bool:
    if not has_memory(x) or not has_memory(y):
        return True
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


class _Reads(TorchFunctionMode):
    """Sees what Python asks of tensors that are not tracked."""

    def __init__(self, observed: Observed):
        super().__init__()
        self._observed = observed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in _READS and args and isinstance(args[0], Tensor):
            self._observed.note_read(args[0])
        kwargs, before = kwargs or {}, self._observed.operations
        out = func(*args, **kwargs)
        if self._observed.operations > before:
            for x in (*args, *kwargs.values()):
                # Places, lengths and counts that no operation took have become numbers on the way.
                if issubclass(type(x), Tensor) and _is_whole(x) and self._observed.taken.get(id(x), 0) <= before:
                    self._observed.note_read(x)
        return out


def _is_whole(x: Tensor) -> bool:
    return not isinstance(x, Tracked) and not x.is_floating_point() and not x.is_complex()


def observe(field: Any, inputs: Sequence[Tensor], observed: Observed) -> None:
    """Calls field(*inputs) and notes what it uses and reads. Raises Leak, in words, with the line."""
    Leak.raised.clear()
    try:
        with observed, _Reads(observed), Picked():
            field(*[Tracked(x) for x in inputs])
        for error in Leak.raised:
            raise error
    except Exception as error:
        said = str(error)
        if isinstance(error, Leak) or any(words in said for words in _WORDS) or "Tracked" in said:
            raise Leak(f"func reads a value of the time, the state or an argument into Python{line_of(error)}") from error
        raise
    finally:
        Leak.raised.clear()


_WORDS = (
    "not supported for tensor subclasses",
    "its data is not allocated",
    "Cannot access data pointer",
    "data pointer of Tensor",
)


def summary(error: BaseException) -> str:
    """Its type and its first line."""
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0]}"


def line_of(error: BaseException) -> str:
    """The user's line that it comes from."""
    lines = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if "/torch/" not in f.filename and "odenet_cuda/compiled/" not in f.filename
    ]
    lines = [f for f in lines if "site-packages" not in f.filename and not f.filename.startswith("<frozen")] or lines
    return f' (File "{lines[-1].filename}", line {lines[-1].lineno}, in {lines[-1].name})' if lines else ""
