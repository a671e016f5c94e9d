"""Put the patches in place, take them away again, and say where they stand."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import sys
import threading
from types import ModuleType
from typing import Any

from . import hooks, startup
from . import settings as _settings
from .errors import ActivationError, CompatibilityError
from .settings import Settings

# Patched module -> the module of `patches` whose `patch(module, settings, undo)` does it.
PATCHES = {
    "transformers.models.gemma.modeling_gemma": "gemma",
    "transformers.models.paligemma.modeling_paligemma": "paligemma",
    "openpi.models.gemma": "openpi_variants",
    "openpi.models.model": "openpi_model",
    "openpi.models_pytorch.pi0_pytorch": "openpi",
    "openpi.policies.policy": "openpi_policy",
    "openpi.training.config": "openpi_configs",
    "lerobot.policies.pi0.modeling_pi0": "lerobot",
    "lerobot.policies.pi05.modeling_pi05": "lerobot",
}
# openpi and lerobot import this module, which only their copied files hold, and call its one function.
CHECK = "transformers.models.siglip.check"
_GEMMA = "transformers.models.gemma.modeling_gemma"
_STOCK = {_GEMMA, "transformers.models.paligemma.modeling_paligemma"}

# `activate()` and `deactivate()` exclude each other. While they hold this, they import.
_switching = threading.RLock()
# Held for patching and undoing; nothing is imported meanwhile, so a thread that holds import locks may wait for it.
_patching = threading.RLock()


@dataclasses.dataclass(frozen=True)
class Status:
    """Where the patches stand.

    Attributes:
        active: whether `activate()` is in force.
        settings: the settings in force, None while inactive.
        modules: for each patched module "waiting" (not imported yet), "patched", "left alone: " and why (a release
            that needs nothing of us), or "refused: " and why.
    """

    active: bool
    settings: Settings | None
    modules: dict[str, str]


@dataclasses.dataclass
class _Active:
    settings: Settings
    undo: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    modules: dict[str, str] = dataclasses.field(default_factory=dict)
    ended: bool = False

    def end(self) -> None:
        """Restore what was patched; a thread that is about to patch finds that it may not any more."""
        with _patching:
            self.ended = True
            self.undo.close()


_active: _Active | None = None


def start() -> None:
    """What `import openpi_lora_patch` puts off (see `startup`): activate, unless `OPENPI_LORA=0` forbids it.

    Raises:
        SettingsError, ActivationError, CompatibilityError: see `activate`.
    """
    if _settings.switched_on() is False:
        deactivate()
    else:
        activate()


def activate(**settings: Any) -> None:
    """Patch transformers and openpi: what is loaded already at once, the rest as it loads. Twice is the same as once.

    Args:
        settings: those of `Settings`; each overrides its `OPENPI_LORA_*` variable.

    Raises:
        SettingsError: a setting has no meaning.
        ActivationError: active with other settings; a module is half imported; or openpi models exist that were
            built before.
        CompatibilityError: a transformers release that was not tested is loaded.
    """
    with _switching:
        wanted = _settings.read(**settings)
        try:
            _activate(wanted)
        except (ActivationError, CompatibilityError):
            startup.stop()  # It was said once, and is true for this process. Anything else is said again.
            raise
        startup.stop()


def _activate(wanted: Settings) -> None:
    global _active
    if _active is not None:
        _require_same(_active.settings, wanted)
        return
    _refuse_live_models()
    starting = _Active(wanted)
    starting.undo.callback(hooks.remove)
    try:
        hooks.provide(CHECK, _populate_check)
        for name, patch in PATCHES.items():
            hooks.on_import(name, functools.partial(_patch, starting, patch))
    except BaseException:
        starting.end()
        raise
    _active = starting


def deactivate() -> None:
    """Restore every object that was changed. Models built meanwhile keep working as they are."""
    global _active
    with _switching:
        startup.stop()
        if _active is not None:
            _active.end()
            _active = None


def status() -> Status:
    """Where the patches stand, module by module."""
    active = _active
    with _patching:
        modules = dict.fromkeys(PATCHES, "waiting") | (active.modules if active is not None else {})
    modules |= {name: f"refused: {error}" for name, error in hooks.refused().items()}
    return Status(active is not None, active.settings if active is not None else None, modules)


def _patch(active: _Active, patch: str, module: ModuleType) -> None:
    if module.__name__.startswith("transformers."):
        from . import compat

        compat.check(module, allow_untested=active.settings.allow_untested)
    patches = importlib.import_module(f".patches.{patch}", __package__)
    with _patching, contextlib.ExitStack() as undo:
        if active.ended:
            return
        left_alone = patches.patch(module, active.settings, undo)
        active.undo.callback(undo.pop_all().close)
        active.modules[module.__name__] = f"left alone: {left_alone}" if left_alone else "patched"


def _populate_check(module: ModuleType) -> None:
    def check_whether_transformers_replace_is_installed_correctly() -> bool:
        """True once Gemma is patched; importing it raises where it cannot be."""
        importlib.import_module(_GEMMA)
        return status().modules[_GEMMA] == "patched"

    module.__dict__["check_whether_transformers_replace_is_installed_correctly"] = (
        check_whether_transformers_replace_is_installed_correctly
    )


def _require_same(active: Settings, wanted: Settings) -> None:
    if active != wanted:
        raise ActivationError(
            "openpi_lora_patch is active with other settings.",
            found=str(active),
            expected=str(wanted),
            fix="call deactivate() first",
        )


def _refuse_live_models() -> None:
    """Models built unpatched have stock norms and scaled embeddings: they would train wrongly without an error."""
    stock = vars(sys.modules.get(_GEMMA, sys)).get("GemmaModel")
    if stock is None:
        return
    from torch import nn

    gc.collect()  # Else what nobody can use any more would count.
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    left_alone = {id(part) for module in modules if _is_derived(type(module)) for part in module.modules()}
    built = [module for module in modules if type(module) is stock and hasattr(module.config, "use_adarms")]
    if live := sum(id(model) not in left_alone for model in built):
        raise ActivationError(
            "openpi models were built before openpi_lora_patch was activated.",
            found=f"{live} unpatched GemmaModel with use_adarms on its config",
            fix="make `import openpi_lora_patch` the first import of the program",
        )


def _is_derived(cls: type) -> bool:
    """Whether its models are left alone, active or not: a subclass, of somebody's own, of one that is converted."""
    own, *bases = (base.__module__ for base in cls.__mro__)
    return own not in _STOCK and not _STOCK.isdisjoint(bases)
