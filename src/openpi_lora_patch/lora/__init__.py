"""LoRA in plain torch: usable alone, on any model, without any patch."""

from .config import LoRAConfig, as_jax, from_openpi
from .dora import DoRALinear
from .freeze import freeze, trainable_parameters
from .inject import inject, lora_layers
from .layer import LoRALinear

__all__ = [
    "DoRALinear",
    "LoRAConfig",
    "LoRALinear",
    "as_jax",
    "freeze",
    "from_openpi",
    "inject",
    "lora_layers",
    "trainable_parameters",
]
