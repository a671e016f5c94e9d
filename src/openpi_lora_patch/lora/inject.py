"""Swap Linears for `LoRALinear`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import LoRAError
from .config import LoRAConfig
from .dora import DoRALinear
from .jax import FORMS
from .layer import LoRALinear


def inject(root: nn.Module, targets: Mapping[str, LoRAConfig]) -> list[str]:
    """Give every child of `root`'s modules whose own name is in `targets` an adapter.

    Args:
        root: changed in place.
        targets: adapter by the last part of a Linear's name ("q_proj").

    Returns:
        The full names of the swapped Linears, below `root`.

    Raises:
        LoRAError: a target that is not there at all, is no Linear, or has an adapter already. Nothing is swapped then.
    """
    found = {
        f"{parent_name}.{name}".lstrip("."): (parent, name, child)
        for parent_name, parent in root.named_modules()
        if not isinstance(parent, LoRALinear)
        for name, child in parent.named_children()
        if name in targets
    }
    if missing := sorted(set(targets) - {name for _, name, _ in found.values()}):
        raise LoRAError(
            "Some LoRA targets match no module.",
            found=f"no {', '.join(missing)} in {type(root).__name__}",
            expected="Linears of these names",
            fix="check the target names against model.named_modules()",
        )
    unfit = [f"{full} is a {type(child).__name__}" for full, (_, _, child) in found.items() if not _is_linear(child)]
    if unfit:
        raise LoRAError("Some LoRA targets cannot take an adapter.", found=", ".join(unfit[:5]), expected="Linears")
    for parent, name, child in found.values():
        setattr(parent, name, adapted(child, targets[name]))
    return list(found)


def adapted(linear: nn.Module, config: LoRAConfig) -> LoRALinear:
    """`linear` with an adapter of the kind that `config` says."""
    return (DoRALinear if config.use_dora else FORMS[config.form])(linear, config)


def lora_layers(root: nn.Module) -> dict[str, LoRALinear]:
    """Every `LoRALinear` at or below `root`, by name."""
    return {name: module for name, module in root.named_modules() if isinstance(module, LoRALinear)}


def _is_linear(module: nn.Module) -> bool:
    # Quantised Linears need not derive from nn.Linear.
    shaped = hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight")
    return shaped and not isinstance(module, LoRALinear)
