"""Set an attribute so that it can be restored exactly; a module with some names of its own."""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

_ABSENT = object()


def replace(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set `owner.name` to `value` (an owner is a class or a module) and record in `undo` how to restore it."""
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    if before is _ABSENT:
        undo.callback(delattr, owner, name)
    else:
        undo.callback(setattr, owner, name, before)


class Overlay(ModuleType):
    """What `module` holds, but for `names`: in one program's place of it, where nobody else's must change."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        super().__init__(module.__name__)
        self._module = module
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
