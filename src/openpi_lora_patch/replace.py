"""Set an attribute so that it can be restored exactly."""

from __future__ import annotations

import contextlib
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
