"""LoRA fine-tuning of pi0 and pi0.5 in PyTorch: unmodified openpi on stock transformers, patched at run time.

Importing this package activates it (unless `OPENPI_LORA=0`). That imports neither torch nor transformers.
"""

from .activation import Status, activate, deactivate, start, status
from .errors import (
    ActivationError,
    CheckpointError,
    CompatibilityError,
    FrozenParametersError,
    LoRAError,
    OpenpiLoraError,
    SettingsError,
)

__version__ = "0.1.0"

__all__ = [
    "ActivationError",
    "CheckpointError",
    "CompatibilityError",
    "FrozenParametersError",
    "LoRAError",
    "OpenpiLoraError",
    "SettingsError",
    "Status",
    "activate",
    "deactivate",
    "status",
]

start()
