"""Run a function when a named module loads, refuse the module for good, or provide one that has no file.

wrapt calls the function after the module's code has run. Around it stands one finder of our own on `sys.meta_path`,
because wrapt alone forgets a hook once it ran: a module that is refused, or dropped from `sys.modules`, would load
unpatched the next time. The finder also keeps wrapt (about 100 ms) out of processes that never import such a module.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from .errors import ActivationError, OpenpiLoraError

Hook = Callable[[ModuleType], None]

_hooks: dict[str, Hook] = {}
_refused: dict[str, OpenpiLoraError] = {}
_virtual: dict[str, Hook] = {}
# Names that wrapt holds a pending registration for. It outlives `remove()`: wrapt cannot unregister.
_armed: set[str] = set()


def on_import(name: str, hook: Hook) -> None:
    """Call `hook(module)` each time the module `name` has loaded; at once if it is loaded already.

    An error in `hook` makes the import fail, now and every later time until `remove()`.

    Raises:
        ActivationError: the module's code is running right now, so that a hook would see half of it.
    """
    module = sys.modules.get(name)
    if module is not None and getattr(module.__spec__, "_initializing", False):
        raise ActivationError(
            f"{name} is being imported at this moment.",
            expected="openpi_lora_patch activated before or after that import",
            fix="make `import openpi_lora_patch` the first import of the program",
        )
    _install()
    _hooks[name] = hook
    if module is not None:
        hook(module)


def provide(name: str, populate: Hook) -> None:
    """Make `name` importable as a module that `populate(module)` fills; its parent package has to exist."""
    _install()
    _virtual[name] = populate


def refuse(name: str, error: OpenpiLoraError) -> None:
    """Raise `error` whenever `name` is imported, until `remove()`."""
    _install()
    _refused[name] = error


def refused() -> dict[str, OpenpiLoraError]:
    """The modules that cannot be imported, each with its reason."""
    return dict(_refused)


def remove() -> None:
    """Forget every hook, refusal and provided module."""
    for name in _virtual:
        _forget_module(name)
    for registry in (_hooks, _refused, _virtual):
        registry.clear()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def _install() -> None:
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _forget_module(name: str) -> None:
    parent, _, leaf = name.rpartition(".")
    module = sys.modules.pop(name, None)
    if module is not None and vars(sys.modules.get(parent, module)).get(leaf) is module:
        delattr(sys.modules[parent], leaf)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in _refused:
            raise _refused[name].with_traceback(None)
        if name in _virtual:
            return importlib.machinery.ModuleSpec(name, _VirtualLoader(_virtual[name]))
        if name in _hooks and name not in _armed:
            _arm(name)
            # wrapt may have put its finder before this one just now; asking again gives it its turn.
            return importlib.util.find_spec(name)
        return None


class _VirtualLoader(importlib.abc.Loader):
    def __init__(self, populate: Hook) -> None:
        self._populate = populate

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self._populate(module)


_finder = _Finder()


def _arm(name: str) -> None:
    try:
        import wrapt
    except ImportError as error:
        # Not an ImportError: transformers would report it as a missing module, which callers swallow.
        raise ActivationError(
            "wrapt cannot be imported.", found=str(error), fix="pip install --force-reinstall wrapt"
        ) from error
    _armed.add(name)
    wrapt.register_post_import_hook(_loaded, name)


def _loaded(module: ModuleType) -> None:
    name = module.__name__
    _armed.discard(name)
    if name not in _hooks:
        return
    try:
        _hooks[name](module)
    except OpenpiLoraError as error:
        refuse(name, error)
        raise
    except Exception as error:
        unexpected = ActivationError(
            f"Patching {name} failed.",
            found=f"{type(error).__name__}: {error}",
            fix="run `python -m openpi_lora_patch.verify` and report what it prints",
        )
        refuse(name, unexpected)
        raise unexpected from error
