"""Several adapters on one base, one in force at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..lora.inject import lora_layers
from . import adapters, files

_NEITHER = object()


class Switcher:
    """Adapters by name for one model, which all have its ranks and were trained on its base.

    They are copied into the model's own parameters, because compiled models and CUDA graphs keep those addresses.

    Args:
        model: one with adapters; what it holds now is in force whenever no name is given.
        folders: the adapters by name.

    Raises:
        CheckpointError: a model without adapters, or an adapter that does not fit, see `adapters.load_adapter`; the
            model is as it was.
    """

    def __init__(self, model: nn.Module, folders: Mapping[str, files.Path]) -> None:
        if not lora_layers(model):
            raise CheckpointError("The model has no adapters to switch.", fix="use a *_lora variant")
        self._lock = threading.RLock()
        self._in_use = False
        self._active: object = None
        self._targets: dict[str, Tensor] = {}
        self._values: dict[str | None, dict[str, Tensor]] = {}
        for name, folder in folders.items():
            adapter = adapters.fitting(model, adapters.read_adapter(folder))
            targets = adapters.targets(model, adapter)
            self._targets |= targets
            self._values[name] = {key: adapter.tensors[key].to(target) for key, target in targets.items()}
        self._values[None] = {key: target.detach().clone() for key, target in self._targets.items()}

    @property
    def names(self) -> list[str]:
        """The names that `using` takes."""
        return sorted(name for name in self._values if name is not None)

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Have the adapter `name` in force within the block; other threads wait until it ends.

        Raises:
            CheckpointError: no adapter of that name, or within such a block of the same thread; the one in force stays.
        """
        if not isinstance(name, str | None) or name not in self._values:  # A request may hold anything.
            found, known = f"{name!r:.200}", ", ".join(self.names)
            raise CheckpointError("There is no adapter of this name.", found=found, expected=known)
        with self._lock:
            if self._in_use:  # By another coroutine, say, which the lock does not keep out.
                raise CheckpointError("An adapter is in force here already.", fix="leave its block first")
            self._in_use = True
            try:
                self._bring(name)
                yield
            finally:
                self._in_use = False

    def _bring(self, name: str | None) -> None:
        if name == self._active:
            return
        # One adapter may hold tensors that another leaves to the model.
        values = self._values[None] | self._values[name]
        self._active = _NEITHER  # If copying fails midway, whoever comes next has to copy all.
        with torch.no_grad():
            torch._foreach_copy_([self._targets[key].detach() for key in values], list(values.values()))
        self._active = name
