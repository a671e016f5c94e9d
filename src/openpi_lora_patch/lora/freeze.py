"""What trains, decided by module, and a guard that it stays so.

A tower with adapters is frozen but for them; SigLIP and the projector go with PaliGemma; a tower without adapters
trains; the heads (all that lies outside `paligemma_with_expert`) train; the action expert's `lm_head`, which no code
path uses, never does. The presets differ from this only as `trainable_parameters` says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import FrozenParametersError, LoRAError
from ..settings import FREEZE_PRESETS
from .inject import lora_layers


def trainable_parameters(model: nn.Module, preset: str = "default") -> list[nn.Parameter]:
    """The parameters of a pi0 or pi0.5 that train under `preset`.

    Args:
        model: openpi's `PI0Pytorch` or one of its shape.
        preset: "default"; "jax": SigLIP and the projector train too, as under openpi's JAX filter
            (`Pi0Config.get_freeze_filter`); "adapters": nothing but the adapters.

    Raises:
        LoRAError: an unknown preset.
    """
    if preset not in FREEZE_PRESETS:
        raise LoRAError("Unknown freezing preset.", found=repr(preset), expected=", ".join(FREEZE_PRESETS))
    towers: Any = model.paligemma_with_expert
    chosen = [p for layer in lora_layers(towers).values() for p in layer.parameters(recurse=False)]
    if preset == "adapters":
        return chosen
    inside = {id(p) for p in towers.parameters()}
    chosen += [p for p in model.parameters() if id(p) not in inside]
    vision = towers.paligemma.model
    if preset == "jax":
        chosen += [*vision.vision_tower.parameters(), *vision.multi_modal_projector.parameters()]
    if not lora_layers(towers.paligemma):
        chosen += towers.paligemma.parameters()
    if not lora_layers(towers.gemma_expert):
        chosen += towers.gemma_expert.model.parameters()
    return chosen


def freeze(model: nn.Module, preset: str = "default", keep_frozen: Iterable[nn.Parameter] = ()) -> None:
    """Set `requires_grad` throughout a pi0 or pi0.5 as `preset` says, and hold it to that in every training forward.

    Args:
        model: openpi's `PI0Pytorch` or one of its shape.
        preset: see `trainable_parameters`.
        keep_frozen: parameters that do not train whatever the preset says.

    Raises:
        LoRAError: an unknown preset.
    """
    chosen = {id(p) for p in trainable_parameters(model, preset)} - {id(p) for p in keep_frozen}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    guarded: Any = model
    if not hasattr(guarded, "_trainable_names"):
        # After the forward, not before: the GPU then works while this looks at every parameter.
        guarded.register_forward_hook(check_frozen)
    guarded._trainable_names = _names_that_train(model)


def check_frozen(model: Any, *_: Any) -> None:
    """A forward hook of every model that `freeze` was called on.

    Raises:
        FrozenParametersError: in training, other parameters train than `freeze` decided.
    """
    if not model.training:
        return
    now, decided = _names_that_train(model), model._trainable_names
    if now != decided:
        raise FrozenParametersError(
            "What trains has changed since LoRA was set up.",
            found=f"thawed: {_some(now - decided)}; frozen: {_some(decided - now)}",
            expected=f"the {len(decided)} tensors of the freezing preset, and no others",
            fix="undo the requires_grad_() call that did it, or call openpi_lora_patch.lora.freeze(model, preset)",
        )


def _names_that_train(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _some(names: frozenset[str]) -> str:
    first = ", ".join(sorted(names)[:5])
    return f"{first} and {len(names) - 5} more" if len(names) > 5 else first or "none"
