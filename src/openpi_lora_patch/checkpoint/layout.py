"""Let a LoRA model load, through plain `load_state_dict`, checkpoints whose names or shapes differ from its own.

Three layouts are accepted, one a file:
- a base checkpoint: `q_proj.weight`, no adapters. The adapters keep the values they have; fresh ones follow the base.
- our own: `q_proj.base_layer.weight`, `q_proj.lora_A` (r, in), `q_proj.lora_B` (out, r).
- the same with both adapter matrices transposed: `lora_A` (in, r), `lora_B` (r, out).

Each may lack the weight of an `UnusedLinear`.
"""

from __future__ import annotations

import logging
from typing import Any, cast

from torch import Tensor, nn

from ..errors import CheckpointError
from ..lora.inject import lora_layers
from ..lora.layer import LoRALinear
from ..lora.quantized import HeldLinear, UnusedLinear

logger = logging.getLogger("openpi_lora_patch")

StateDict = dict[str, Tensor]


def accept_base_checkpoints(model: nn.Module) -> None:
    """Have `model.load_state_dict` (and with it `safetensors.torch.load_model`) take each of the layouts above.

    A tensor of another shape than the model's makes the load raise `CheckpointError` before anything is copied.
    """
    model._register_load_state_dict_pre_hook(_before_load, with_module=True)
    model.register_load_state_dict_post_hook(_after_load)


def _before_load(model: Any, state_dict: StateDict, prefix: str, *_: Any) -> None:
    layers = {prefix + name: layer for name, layer in lora_layers(model).items()}
    _rename_base_layers(layers, state_dict)
    adapters = _adapters(layers)
    # Where nothing of these layers is in the file, the caller reports what is missing.
    held = any(f"{name}.base_layer.weight" in state_dict for name in layers)
    model._base_alone = held and adapters.keys().isdisjoint(state_dict)
    if held:
        _keep_unused(model, state_dict, prefix)
    if model._base_alone:
        state_dict.update(adapters)
        logger.info("The checkpoint holds no adapters: %d adapters keep the values they have", len(layers))
    if _is_transposed(adapters, state_dict):
        state_dict.update({name: state_dict[name].t() for name in adapters.keys() & state_dict.keys()})
    _check_shapes(model, state_dict, prefix)


def _after_load(model: Any, _: Any) -> None:
    if model._base_alone:
        for layer in lora_layers(model).values():
            layer.follow_base()


def _rename_base_layers(layers: dict[str, LoRALinear], state_dict: StateDict) -> None:
    for name in layers:
        for part in ("weight", "bias"):
            plain, wrapped = f"{name}.{part}", f"{name}.base_layer.{part}"
            if plain in state_dict and wrapped in state_dict:
                raise CheckpointError("A checkpoint holds a base weight twice.", found=f"{plain} and {wrapped}")
            if plain in state_dict:
                state_dict[wrapped] = state_dict.pop(plain)


def _adapters(layers: dict[str, LoRALinear]) -> StateDict:
    """The adapters' parameters by their names in a state dict."""
    return {
        f"{name}.{own}": parameter.detach()
        for name, layer in layers.items()
        for own, parameter in layer.named_parameters(recurse=False)
    }


def _keep_unused(model: nn.Module, state_dict: StateDict, prefix: str) -> None:
    """Let a file lack what nothing uses."""
    unused = {name: module for name, module in model.named_modules() if isinstance(module, UnusedLinear)}
    for name, module in unused.items():
        state_dict.setdefault(f"{prefix}{name}.weight", cast(Tensor, module))


def _is_transposed(adapters: StateDict, state_dict: StateDict) -> bool:
    """Whether every adapter matrix of the file fits transposed and some fit in no other way."""
    pairs = [
        (tuple(state_dict[key].shape), tuple(parameter.shape))
        for key, parameter in adapters.items()
        if key in state_dict
    ]
    return all(found == wanted[::-1] for found, wanted in pairs) and any(found != wanted for found, wanted in pairs)


def _check_shapes(model: nn.Module, state_dict: StateDict, prefix: str) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    wanted |= {
        f"{name}.weight": module.shape for name, module in model.named_modules() if isinstance(module, HeldLinear)
    }
    wrong = [
        f"{prefix + name} {tuple(state_dict[prefix + name].shape)} for {shape}"
        for name, shape in wanted.items()
        if prefix + name in state_dict and tuple(state_dict[prefix + name].shape) != shape
    ]
    if wrong:
        raise CheckpointError(
            "A checkpoint does not fit the model; nothing was loaded.",
            found="; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
            expected="tensors of the model's shapes",
            fix="use the variant (and with it the rank) that the checkpoint was trained with",
        )
