"""What importing this package does: next to nothing, until one of the packages that it patches is imported.

With `OPENPI_LORA=1` every start of Python does it, so what activates (20 ms, for dataclasses and the like) waits.
"""

from __future__ import annotations

import sys

from .errors import ActivationError

TYPE_CHECKING = False  # What typing calls so, without its import.
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

PACKAGES = frozenset({"transformers", "openpi", "lerobot"})


def start() -> None:
    """Activate when the first of `PACKAGES` is imported; at once where one is loaded already.

    Raises:
        SettingsError, ActivationError, CompatibilityError: see `activation.activate`. After the first, each import of
            `PACKAGES` is refused: an error at interpreter start is printed, but does not end the program.
    """
    if not _is_waiting():
        sys.meta_path.insert(0, _finder)
    if not PACKAGES.isdisjoint(sys.modules):
        activation()


def stop() -> None:
    """Wait for no import any more: somebody has decided."""
    withdraw(_finder)


def withdraw(finder: object) -> None:
    """Take `finder` off `sys.meta_path`, if it is there."""
    if finder in sys.meta_path:
        # A list of its own: a thread that is going through this one would pass over the finder after ours.
        sys.meta_path = [other for other in sys.meta_path if other is not finder]


def activation() -> ModuleType:
    """The module `activation`, which has done what `start` put off.

    Raises:
        SettingsError: a setting has no meaning.
        ActivationError: see `activation.activate`; or this package is not whole.
        CompatibilityError: a transformers release that was not tested is loaded.
    """
    try:
        from . import activation
    except ImportError as error:
        # Not an ImportError: callers swallow it, and go on without transformers.
        raise ActivationError(
            "openpi_lora_patch cannot be imported.", found=str(error), fix="reinstall it, or unset OPENPI_LORA"
        ) from error
    if _is_waiting():
        activation.start()
    return activation


def _is_waiting() -> bool:
    return _finder in sys.meta_path


class _Finder:
    """Activates when it is asked for one of `PACKAGES`, or for a part of one.

    The thread that asks holds import locks. Should another be activating, it may wait for that one, which imports
    nothing of `PACKAGES`: none is loaded.
    """

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in PACKAGES:
            return None
        activation()
        from . import hooks

        # This search began before the finder of `hooks` was there.
        return hooks.finder.find_spec(name, path, target)


_finder = _Finder()
