"""LoRA training configs in openpi's own list, where `train_pytorch.py`, `serve_policy.py` and `get_config` find them.

`cli()` is the last that the script calls before it trains.

Source: openpi, `training/config.py` (commit 15a9616); each config is one of openpi's with the LoRA variants put in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from types import ModuleType
from typing import Any

from ..replace import replace
from ..settings import Settings
from . import openpi_training
from .openpi_variants import DUMMY_LORA

# Fails as a missing file until the user gives a real one, as openpi's own PyTorch configs do.
_WEIGHTS = "/path/to/your/pytorch_weight_path"
_FULL = {"paligemma_variant": "gemma_2b_lora", "action_expert_variant": "gemma_300m_lora"}


def patch(module: ModuleType, settings: Settings, undo: contextlib.ExitStack) -> None:
    """Add the configs that openpi does not have by that name already, and prepare the script that asks for one."""
    if settings.skip_init:
        replace(undo, module, "cli", _preparing(module.cli, undo.enter_context(contextlib.ExitStack())))
    for config in _configs(module):
        if config.name not in module._CONFIGS_DICT:
            module._CONFIGS.append(config)
            module._CONFIGS_DICT[config.name] = config
            undo.callback(module._CONFIGS.remove, config)
            undo.callback(module._CONFIGS_DICT.pop, config.name)


def _preparing(original: Any, undo: contextlib.ExitStack) -> Any:
    @functools.wraps(original)
    def cli() -> Any:
        config = original()
        openpi_training.prepare(undo)
        return config

    return cli


def _configs(module: ModuleType) -> list[Any]:
    return [
        _with_lora(module.get_config("pi0_libero"), "pi0_libero_lora_pytorch"),
        _with_lora(
            module.get_config("pi05_libero"),
            "pi05_libero_lora_pytorch",
            # What openpi trains its other LoRA configs with; its pi0.5 run has 256 samples a step on many GPUs.
            batch_size=32,
            lr_schedule=module._optimizer.CosineDecaySchedule(),
        ),
        _debug(module),
    ]


def _with_lora(config: Any, name: str, **changes: Any) -> Any:
    return dataclasses.replace(
        config,
        name=name,
        model=dataclasses.replace(config.model, **_FULL),
        pytorch_weight_path=_WEIGHTS,
        ema_decay=None,
        **changes,
    )


def _debug(module: ModuleType) -> Any:
    model = module.pi0_config.Pi0Config

    # A dataclass of its own, because openpi types its variants as a closed list, which the command line enforces.
    @dataclasses.dataclass(frozen=True)
    class DebugConfig(model):  # type: ignore[misc, valid-type]
        paligemma_variant: str = DUMMY_LORA
        action_expert_variant: str = DUMMY_LORA
        pytorch_compile_mode: str | None = None

    @dataclasses.dataclass(frozen=True)
    class DebugData(module.FakeDataConfig):  # type: ignore[name-defined]
        """openpi's fake data, with normalisation that changes nothing, so that the checkpoint can be served."""

        def create(self, assets_dirs: Any, model_config: Any) -> Any:
            zeros, ones = [0.0] * model_config.action_dim, [1.0] * model_config.action_dim
            stats = module._transforms.NormStats(mean=zeros, std=ones)
            return dataclasses.replace(
                super().create(assets_dirs, model_config),
                asset_id="debug",
                norm_stats={"state": stats, "actions": stats},
            )

    return dataclasses.replace(
        module.get_config("debug"),
        name="debug_lora_pytorch",
        model=DebugConfig(),
        data=DebugData(),
        exp_name=module.tyro.MISSING,
        overwrite=False,
        num_workers=0,
        ema_decay=None,
    )
