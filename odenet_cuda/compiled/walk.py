"""The walk of `Reach` over functions, modules, objects and containers: what it has found, and what the rules for each kind of
value ask of it.

Everything found has a slot: the place, such as an attribute or a global name that the code uses, where it is found again. Of
the user's objects, attributes that no code names are left out. Code of the standard library, of torch and of installed packages
is taken as it is; the objects they make are walked whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from . import kinds
from .kinds import CONTAINERS, COUNTING, PLAIN, WRAPPED, is_fixed, is_library_class
from .scan import Names
from .trees import kinds_in

LARGEST_ARRAY = 1 << 16  # bytes that are compared at every call

MOST = 5_000  # slots


@dataclass(eq=False)
class Slot:
    """Where a value is found: owner[key], or getattr(owner, key)."""

    owner: Any
    key: Any
    attribute: bool
    value: Any
    path: str

    def get(self) -> Any:
        return getattr(self.owner, self.key) if self.attribute else self.owner[self.key]

    def put(self, value: Any) -> None:
        """Raises TypeError, AttributeError where nothing can be written there."""
        if self.attribute:  # without code of the user
            (type if isinstance(self.owner, type) else object).__setattr__(self.owner, self.key, value)
        else:
            self.owner[self.key] = value


class Walk:
    """The walk from func, and from what args hold besides tensors and numbers. refusal: why it cannot be trusted, or "".
    closed: values made of numbers, of which the kinds alone are walked; met: how often the walk came upon each, by id.

    What the code names is known only when all of it has been seen: the walk begins anew until it finds no more names."""

    def __init__(self, func: Callable, args: Sequence[Any] = (), closed: Sequence[Any] = ()):
        self._closed = {id(x): x for x in closed}
        self.names = Names()
        self.everything = False  # the code names attributes that cannot be seen
        self.made: set[type] = set()  # classes that the code may call, with their bases
        self.whole: set[type] = set()  # of whose objects library code may use what no code of the user names
        self.owned: set[str] = set()  # attributes that library code may read
        while True:
            before = self._known()
            self._begin()
            self.visit(func, "func")
            for i, x in enumerate(args):
                self._argument(x, f"args[{i}]")
            while self._waiting and len(self.slots) < MOST:
                self._open(*self._waiting.pop())
            if self._known() == before:
                break
        if len(self.slots) >= MOST:
            self.refuse(f"func reaches more than {MOST} values of Python")
        self._end()

    def _known(self) -> tuple[int, ...]:
        sets = (*vars(self.names).values(), self.made, self.whole, self.owned)
        return (self.everything, *[len(part) for part in sets])

    def _begin(self) -> None:
        self.slots: list[Slot] = []
        self.sized: list[tuple[Any, frozenset[str] | None]] = []  # containers, and of an object's the keys that matter if new
        self.absent: list[tuple[dict[str, Any], str]] = []  # global names that do not exist
        self.containers: list[tuple[Any, str]] = []
        self.globals: list[tuple[dict[str, Any], str]] = []  # that the code writes
        self.cells: list[tuple[Any, str, str]] = []
        self.slotted: list[tuple[Any, str, str]] = []
        self.classes: list[type] = []
        self.tensors: dict[int, Tensor] = {}
        self.arrays: dict[int, tuple[np.ndarray, str]] = {}
        self.generators: list[Any] = []
        self.sets: list[Any] = []
        self.refusal = ""
        self.seen: dict[int, Any] = {}  # opened or waiting; kept alive, so that no other object gets the id of one
        self.parts: set[type] = set()  # classes and their bases
        self.given: dict[int, Any] = {}  # containers of args
        self.met = dict.fromkeys(self._closed, 0)
        self._waiting: list[tuple[Any, str]] = []

    def refuse(self, why: str) -> None:
        self.refusal = self.refusal or why

    def hidden(self, value: Any, path: str) -> None:
        self.refuse(f"{path} is a {type(value).__name__}, whose changes cannot be seen")

    def visit(self, value: Any, path: str) -> None:
        if isinstance(value, type):
            self.made.update(value.__mro__)
        self.wait(value, path)

    @property
    def by_identity(self) -> bool:
        """Whether the code may ask by `is` if two numbers are one."""
        numbers: dict[Any, bool] = {}  # by name
        for slot in self.slots:
            name = slot.path if slot.key == "cell_contents" else slot.key
            numbers[name] = numbers.get(name, False) or issubclass(type(slot.value), (int, float, *WRAPPED))
        return any([all([numbers.get(name, True) for name in pair]) for pair in self.names.identical])

    @property
    def known(self) -> frozenset[int]:
        """The ids of all that func reaches but tensors, which come and go, and containers of args."""
        return frozenset([i for i, x in self.seen.items() if not isinstance(x, Tensor)])

    def _pass(self, value: Any, path: str) -> bool:
        """Whether it is closed."""
        if id(value) not in self.met:
            return False
        self.met[id(value)] += 1
        for kind in kinds_in(value) - PLAIN:
            (self.visit if "__class__" in self.names.attributes else self.wait)(kind, path)
        return True

    def wait(self, value: Any, path: str) -> None:
        if self._closed and self._pass(value, path):
            return
        if id(value) not in self.seen and not is_fixed(value):
            self.seen[id(value)] = value
            self._waiting.append((value, path))

    def keep(self, owner: Any, key: Any, value: Any, path: str, attribute: bool = False) -> None:
        """A slot whose value the caller opens itself, or nobody."""
        self.slots.append(Slot(owner, key, attribute, value, path))

    def slot(self, owner: Any, key: Any, value: Any, path: str, attribute: bool = False) -> None:
        self.keep(owner, key, value, path, attribute)
        self.visit(value, path)

    def named(self, name: str) -> bool:
        return self.everything or name in self.names.attributes

    def counted(self, name: Any, value: Any) -> bool:
        """Whether the code only counts with this name, so that its number is nowhere in the program."""
        counts = type(value) in COUNTING and not self.everything
        return counts and name in self.names.stored and name not in self.names.read and name not in self.owned

    def _open(self, value: Any, path: str) -> None:
        """What the value consists of: see reach.py."""
        raise NotImplementedError

    def _end(self) -> None:
        """What is reached besides."""

    def _argument(self, value: Any, path: str) -> None:
        """Numbers, tensors and what containers hold are compared by value: the next solve may be given others."""
        kind = type(value)
        if self._pass(value, path):
            return
        if isinstance(value, CONTAINERS):
            if id(value) in self.given:
                return
            self.given[id(value)] = value
            if kind not in PLAIN:
                self.visit(kind, path)
                if not isinstance(value, tuple) or hasattr(value, "__dict__") or kinds.accessors_replaced(kind):
                    self.hidden(value, path)
                    return
            for part in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
                self._argument(part, f"{path}[...]")
        elif isinstance(value, Tensor):
            if not is_library_class(kind) or any(map(self.named, vars(value))):
                self.refuse(f"{path} is a tensor with attributes of Python, whose changes cannot be seen")
        elif kind is not np.ndarray:
            self.visit(value, path)

    def wanted(self) -> frozenset[str] | None:
        return None if self.everything else frozenset(self.names.attributes)
