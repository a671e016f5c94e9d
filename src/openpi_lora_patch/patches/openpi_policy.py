"""openpi's policy server with several adapters: a request names the one it wants in its field "adapter".

Source: openpi, `policies/policy.py` (commit 15a9616).
"""

from __future__ import annotations

import contextlib
import functools
from types import ModuleType
from typing import Any

from ..checkpoint.switch import Switcher
from ..errors import CheckpointError
from ..lora.inject import lora_layers
from ..replace import replace
from ..settings import Settings

FIELD = "adapter"


def patch(module: ModuleType, settings: Settings, undo: contextlib.ExitStack) -> None:
    """Teach `Policy` the field, where `OPENPI_LORA_ADAPTERS` names adapters; elsewhere no name is known."""
    policy = module.Policy
    if settings.adapters:
        replace(undo, policy, "__init__", _loading(policy.__init__, settings))
    replace(undo, policy, "infer", (_choosing if settings.adapters else _refusing)(policy.infer))


def _loading(original: Any, settings: Settings) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model, *args, **kwargs)
        if not self._is_pytorch_model:
            raise CheckpointError("OPENPI_LORA_ADAPTERS needs a PyTorch checkpoint.", found="a JAX checkpoint")
        self.adapters = Switcher(self._model, dict(settings.adapters))

    return __init__


def _choosing(original: Any) -> Any:
    @functools.wraps(original)
    def infer(self: Any, obs: dict[str, Any], **kwargs: Any) -> Any:
        request = {name: value for name, value in obs.items() if name != FIELD}
        with self.adapters.using(obs.get(FIELD)):
            return original(self, request, **kwargs)

    return infer


def _refusing(original: Any) -> Any:
    @functools.wraps(original)
    def infer(self: Any, obs: dict[str, Any], **kwargs: Any) -> Any:
        if FIELD in obs and self._is_pytorch_model and lora_layers(self._model):
            raise CheckpointError(
                "There is no adapter of this name.",
                found=f"{obs[FIELD]!r:.200}",
                fix="start it with OPENPI_LORA_ADAPTERS",
            )
        return original(self, obs, **kwargs)

    return infer
