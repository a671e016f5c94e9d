"""Adapter-only checkpoints for code that knows nothing of them: what saves or loads a state dict through the model.

openpi's scripts call `safetensors.torch.save_model(model, path)` and `load_model(model, path)`. The first asks the
model for its state dict and the second hands it one, so both can be served here, on this one model.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..lora.inject import lora_layers
from ..lora.quantized import HeldLinear
from . import adapters, files
from .stored import stored_tensors

logger = logging.getLogger("openpi_lora_patch")


def load_adapters_through(model: nn.Module, base: str = "") -> None:
    """Have `model.load_state_dict` take an adapter-only checkpoint, on a base that has to be the right one.

    Args:
        model: one with adapters.
        base: checkpoint (`model.safetensors` or its folder) that the adapters go onto; empty for the model's weights.
    """
    model._register_load_state_dict_pre_hook(_Loader(base), with_module=True)


def save_adapters_only(model: nn.Module) -> None:
    """Have `model.state_dict()` hold the adapters and whatever else trains, and nothing of the frozen base."""
    model._register_state_dict_hook(_only_adapters)
    model._register_load_state_dict_pre_hook(_with_tied_names, with_module=True)


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within it `model.load_state_dict` takes all of the model's tensors, tied ones by one name, or changes nothing.

    torch copies what fits before it says what is missing. `CheckpointError` comes first, as for a wrong shape.
    """
    # After those that rename what a file holds.
    handle = model._register_load_state_dict_pre_hook(_refuse_part, with_module=True)
    try:
        yield
    finally:
        handle.remove()


def _refuse_part(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    _with_tied_names(model, state_dict, prefix)
    own = {prefix + name for names in names_of(model).values() for name in names}
    own |= {prefix + name for name in _persistent_buffers(model)}
    missing, unexpected = sorted(own - state_dict.keys()), sorted(state_dict.keys() - own)
    if missing or unexpected:
        raise CheckpointError(
            "A checkpoint does not fit the model; nothing was loaded.",
            found=f"missing: {', '.join(missing[:5]) or 'none'}; unexpected: {', '.join(unexpected[:5]) or 'none'}",
            expected="each of the model's tensors, and no other",
            fix="use the variants that it was trained with",
        )


def _only_adapters(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]
    taken = adapters.to_state_dict(adapters.take(model, getattr(model, "openpi_config", None)))
    state_dict.update({prefix + name: tensor for name, tensor in taken.items()})


def _with_tied_names(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    # safetensors fills these in itself where the model's state dict shows that they are shared.
    for names in names_of(model).values():
        held = [prefix + name for name in names if prefix + name in state_dict]
        for name in names if held else ():
            state_dict.setdefault(prefix + name, state_dict[held[0]])


class _Loader:
    """A load hook; a class, so that a model with it can be copied and pickled."""

    def __init__(self, base: str) -> None:
        self.base = base

    def __call__(self, model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        if prefix + adapters.METADATA not in state_dict:
            return
        taken = adapters.from_state_dict({name.removeprefix(prefix): tensor for name, tensor in state_dict.items()})
        weights = _own(model) | (_read_base(model, self.base) if self.base else {})
        base = {name: weights[f"{name}.base_layer.weight"] for name in lora_layers(model)}
        adapter = adapters.fitting(model, taken, base=base)
        places = {id(tensor): name for name, tensor in _own(model).items()}
        for name, target in adapters.targets(model, adapter).items():
            weights[places[id(target)]] = adapter.tensors[name]
        state_dict.clear()
        state_dict.update({prefix + name: tensor for name, tensor in weights.items()})
        logger.info("Loaded %d adapters onto %s", len(base), self.base or "the base weights that are there")


def names_of(model: nn.Module) -> dict[Any, list[str]]:
    """The names of each parameter and `HeldLinear`, sorted; a tied one has several."""
    names: dict[Any, list[str]] = {}
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        names.setdefault(parameter, []).append(name)
    held = {name: module for name, module in model.named_modules() if isinstance(module, HeldLinear)}
    return names | {module: [f"{name}.weight"] for name, module in held.items()}


def absent(model: nn.Module, missing: Iterable[str]) -> list[str]:
    """Those of the `missing` names of a load whose tensor did not come under another of its names either."""
    missing = set(missing)
    there = {name for names in names_of(model).values() if not missing.issuperset(names) for name in names}
    return sorted(missing - there)


def _own(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors; a tied one under its first name, the one that safetensors keeps."""
    return {names[0]: parameter for parameter, names in names_of(model).items()} | _persistent_buffers(model)


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{own}".lstrip("."): buffer
        for name, module in model.named_modules()
        for own, buffer in module.named_buffers(recurse=False)
        if own not in module._non_persistent_buffers_set
    }


def _read_base(model: nn.Module, base: str) -> dict[str, Tensor]:
    stored = stored_tensors(files.weights_file(base))
    layers, own = lora_layers(model), _own(model)
    found: dict[str, Tensor] = {}
    for names in names_of(model).values():
        plain = [n.replace(".base_layer.", ".") if n.partition(".base_layer.")[0] in layers else n for n in names]
        if held := [stored[name] for name in (*names, *plain) if name in stored]:
            found[names[0]] = held[0]
    frozen = {name for name, tensor in own.items() if not tensor.requires_grad}
    wrong = [name for name in frozen if name not in found or found[name].shape != own[name].shape]
    if wrong:
        raise CheckpointError(
            f"{base} is no base of this model; nothing was loaded.",
            found=f"missing or of another shape: {', '.join(sorted(wrong)[:5])}",
            expected="a plain checkpoint of the same variants",
        )
    return found
