"""Run a function when a named module loads, or provide a module that has no file.

wrapt calls the function. For these modules one finder of our own on `sys.meta_path` stands in for wrapt's, which asks
`importlib.util.find_spec` and so waits for the parent package: where another thread is importing that package, which
imports the module, both wait for ever (`tests/test_concurrency.py`). Ours asks the finders beside it and waits for no
lock. It also keeps wrapt (about 100 ms) out of processes that never import such a module.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from . import startup
from .errors import ActivationError, OpenpiLoraError

Hook = Callable[[ModuleType], None]

_hooks: dict[str, Hook] = {}
_refused: dict[str, OpenpiLoraError] = {}
_virtual: dict[str, Hook] = {}
# Held while nothing is imported, so that no refusal of a hook that was just removed is left behind.
_lock = threading.Lock()


def on_import(name: str, hook: Hook) -> None:
    """Call `hook(module)` each time the module `name` has loaded; at once if it is loaded already.

    An error in `hook` makes the import fail, now and every later time until `remove()`.

    Raises:
        ActivationError: the module is being imported right now, here or in another thread: a hook would see half of it.
    """
    module = sys.modules.get(name)
    _install()
    _hooks[name] = hook
    # An import that another thread began before the hook was there may not meet it.
    half = _is_initializing(module) if module is not None else _is_imported_elsewhere(name) or name in sys.modules
    if half:
        del _hooks[name]
        raise ActivationError(
            f"{name} is being imported at this moment.",
            expected="openpi_lora_patch activated before or after that import",
            fix="make `import openpi_lora_patch` the first import of the program",
        )
    if module is not None:
        hook(module)


def provide(name: str, populate: Hook) -> None:
    """Make `name` importable as a module that `populate(module)` fills; its parent package has to exist."""
    _install()
    _virtual[name] = populate


def refused() -> dict[str, OpenpiLoraError]:
    """The modules that cannot be imported, each with its reason."""
    return dict(_refused)


def remove() -> None:
    """Forget every hook, refusal and provided module."""
    for name in _virtual:
        _forget_module(name)
    with _lock:
        for registry in (_hooks, _refused, _virtual):
            registry.clear()
    startup.withdraw(finder)


def _install() -> None:
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)


def _forget_module(name: str) -> None:
    parent, _, leaf = name.rpartition(".")
    module = sys.modules.pop(name, None)
    if module is not None and vars(sys.modules.get(parent, module)).get(leaf) is module:
        delattr(sys.modules[parent], leaf)


def _is_initializing(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)


def _is_imported_elsewhere(name: str) -> bool:
    # By CPython's own table of import locks in use. One of this thread, which runs this, has not searched yet.
    locks: dict[str, Callable[[], Any]] = getattr(importlib._bootstrap, "_module_locks", {})
    owner = getattr(locks.get(name, lambda: None)(), "owner", None)
    return owner not in (None, threading.get_ident())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if (error := _refused.get(name)) is not None:
            raise error.with_traceback(None)
        if (populate := _virtual.get(name)) is not None:
            return importlib.machinery.ModuleSpec(name, _VirtualLoader(populate))
        if name not in _hooks:
            return None
        skipped = (_Finder, _wrapt().importer.ImportHookFinder)
        others = [other for other in sys.meta_path if not isinstance(other, skipped) and hasattr(other, "find_spec")]
        spec = next(filter(None, (other.find_spec(name, path, target) for other in others)), None)
        # Another finder may have come back to this one, as one like wrapt's does.
        if spec is not None and spec.loader is not None and not isinstance(spec.loader, _HookedLoader):
            spec.loader = _HookedLoader(spec.loader)
        return spec


class _HookedLoader(importlib.abc.Loader):
    """Another loader, and the hook after it. A module that is loaded knows the other one only."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        wrapt = _wrapt()
        wrapt.register_post_import_hook(_loaded, module.__name__)  # Called at once: the module is there.
        wrapt.notify_module_loaded(module)  # What others registered, as wrapt's own finder would.


class _VirtualLoader(importlib.abc.Loader):
    def __init__(self, populate: Hook) -> None:
        self._populate = populate

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        self._populate(module)


finder = _Finder()


def _wrapt() -> ModuleType:
    try:
        import wrapt.importer
    except ImportError as error:
        # Not an ImportError: transformers would report it as a missing module, which callers swallow.
        raise ActivationError(
            "wrapt cannot be imported.", found=str(error), fix="pip install --force-reinstall wrapt"
        ) from error
    return wrapt


def _loaded(module: ModuleType) -> None:
    name = module.__name__
    hook = _hooks.get(name)
    if hook is None:
        return
    try:
        hook(module)
    except OpenpiLoraError as error:
        _refuse_while_hooked(name, hook, error)
        raise
    except Exception as error:
        unexpected = ActivationError(
            f"Patching {name} failed.",
            found=f"{type(error).__name__}: {error}",
            fix="run `python -m openpi_lora_patch.verify` and report what it prints",
        )
        _refuse_while_hooked(name, hook, unexpected)
        raise unexpected from error


def _refuse_while_hooked(name: str, hook: Hook, error: OpenpiLoraError) -> None:
    with _lock:
        if _hooks.get(name) is hook:
            _refused[name] = error
