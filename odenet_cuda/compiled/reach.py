"""What the Python code of a field can reach: a walk from func over functions, modules, objects and containers.

Everything found has a slot: the place, such as an attribute or a global name that the code uses, where it is found again. Of
the user's objects, attributes that no code names are left out. Code of the standard library, of torch and of installed packages
is taken as it is; the objects they make are walked whole.
"""

import types
from typing import Any

from torch import nn

from . import kinds
from .kinds import CALLABLES
from .reach_code import CODE, CONTENT_ALONE
from .reach_objects import OBJECTS, any_object, container
from .walk import Walk

REGISTRATION = "torch's global registration hooks"
_KINDS = [*OBJECTS, *CODE]
_WITHOUT = (*CONTENT_ALONE, nn.Module, slice, types.GenericAlias)
_GLOBAL_HOOKS = [
    (value, REGISTRATION if "registration" in name else "torch's global hooks")
    for name, value in vars(nn.modules.module).items()
    if name.startswith("_global_") and "hooks" in name and isinstance(value, dict)
]


class Reach(Walk):
    """A walk that has come to its end. See `Walk`."""

    def _open(self, value: Any, path: str) -> None:
        """Of anything: what it consists of by its kind, and then the attributes that it has as any object."""
        kind = type(value)
        own = isinstance(value, (type, types.FunctionType, *CALLABLES))
        module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value if own else kind, "__module__", None)
        if root := kinds.impure(module):
            self.refuse(f"func uses {path} of the module {root}, whose values change from call to call")
        for base, rule in _KINDS:
            if issubclass(kind, base):
                rule(self, value, path)
                break
        if not issubclass(kind, _WITHOUT):
            any_object(self, value, path)

    def _end(self) -> None:
        for hooks, path in _GLOBAL_HOOKS:
            container(self, hooks, path)
