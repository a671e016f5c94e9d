"""LoRA fine-tuning of pi0 and pi0.5 in PyTorch: unmodified openpi on stock transformers, patched at run time.

Importing this package has it activate (unless `OPENPI_LORA=0`) once transformers, openpi or lerobot is imported, or at
once where one is loaded. To ask it for `activate`, `deactivate`, `status` or `Status` activates it, too.
"""

from . import startup
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

TYPE_CHECKING = False  # What typing calls so, without its import.
if TYPE_CHECKING:
    from .activation import Status, activate, deactivate, status
else:

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(startup.activation(), name)

    def __dir__():
        return sorted({*globals(), *__all__})


startup.start()
