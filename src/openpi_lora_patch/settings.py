"""Every setting, read once from `OPENPI_LORA_*` variables and `activate()` keywords into one frozen value."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from .errors import SettingsError

SWITCH = "OPENPI_LORA"
FREEZE_PRESETS = ("default", "jax", "adapters")
PARAMETRISATIONS = ("peft", "jax")


def _boolean(text: str) -> bool:
    return {"0": False, "1": True}[text]


def _preset(text: str) -> str:
    return {name: name for name in FREEZE_PRESETS}[text]


def _choice(*names: str) -> tuple[Callable[[str], str], str]:
    return {name: name for name in names}.__getitem__, " or ".join(names)


def _dropout(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise ValueError(text)
    return value


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    parted = [part.partition("=") for part in text.split(",") if part]
    names = {name for name, _, folder in parted if folder}
    if "" in names or len(names) < len(parted):  # One without a folder, or one twice.
        raise ValueError(text)
    return tuple((name, folder) for name, _, folder in parted)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        allow_untested: patch an untested transformers release, with a warning (`OPENPI_LORA_ALLOW_UNTESTED`).
        freeze: which parameters train beside the adapters (`OPENPI_LORA_FREEZE`), see `lora.freeze`.
        parametrisation: of what parameters adapters are made (`OPENPI_LORA_PARAMETRISATION`): PEFT's, or those of
            openpi's JAX code, see `lora.jax`; jax has `freeze` default to jax.
        dropout: probability with which an element of an adapter's input is zeroed in training (`OPENPI_LORA_DROPOUT`).
        dora: adapters with a magnitude of its own for each row (`OPENPI_LORA_DORA`), see `lora.dora`.
        joint: train with a forward of our own for both towers (`OPENPI_LORA_JOINT`); the rest are parts of it, each
            the same function of the weights, and "auto" on for GPUs from Ampere on.
        attention: ours and torch's kernels, triton, torch's alone, sdpa, or transformers' eager
            (`OPENPI_LORA_ATTENTION`).
        fused: Linears and MLPs with adapters as one function each (`OPENPI_LORA_FUSED`).
        trim: leave out cameras and prompt padding that are masked in the whole batch (`OPENPI_LORA_TRIM`).
        prune: leave out the part of the last prefix layer that nothing reads (`OPENPI_LORA_PRUNE`).
        compile: a frozen vision tower by `torch.compile`, and one graph for openpi's own of `sample_actions`
            (`OPENPI_LORA_COMPILE`).
        overlap: what the two towers do apart from each other at once, where one process trains on one GPU
            (`OPENPI_LORA_OVERLAP`).
        skip_init: build without random numbers where a checkpoint follows (`OPENPI_LORA_SKIP_INIT`).
        checkpoint: compute layers again in the backward pass: none, every layer, or auto, as few as the memory that is
            free allows (`OPENPI_LORA_CHECKPOINT`).
        save: what openpi's `train_pytorch.py` saves: the whole model, or the adapter and whatever else trains
            (`OPENPI_LORA_SAVE`).
        base_weights: base checkpoint that an adapter-only checkpoint is loaded onto; by default the weights that the
            model has already (`OPENPI_LORA_BASE_WEIGHTS`).
        base: how the frozen weights under adapters are held: bf16 as openpi has them, or int8, nf4, fp8, see
            `lora.quantized` (`OPENPI_LORA_BASE`).
        base_cache: keep a quantised base in a file beside the checkpoint that it was made from, and load it from there
            (`OPENPI_LORA_BASE_CACHE`).
        adapters: names and folders of the adapters that a request to openpi's `serve_policy.py` can choose from
            (`OPENPI_LORA_ADAPTERS`, "name=folder,name=folder").
    """

    allow_untested: bool = False
    freeze: str = "default"
    parametrisation: str = "peft"
    dropout: float = 0.0
    dora: bool = False
    joint: bool = True
    attention: str = "auto"
    fused: str = "auto"
    trim: str = "auto"
    prune: bool = True
    compile: str = "auto"
    overlap: str = "auto"
    skip_init: bool = True
    checkpoint: str = "auto"
    save: str = "model"
    base: str = "bf16"
    base_cache: bool = False
    base_weights: str = ""
    adapters: tuple[tuple[str, str], ...] = ()


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "allow_untested": (_boolean, "0 or 1"),
    "freeze": (_preset, " or ".join(FREEZE_PRESETS)),
    "parametrisation": _choice(*PARAMETRISATIONS),
    "dropout": (_dropout, "a number from 0 up to, not including, 1"),
    "dora": (_boolean, "0 or 1"),
    "joint": (_boolean, "0 or 1"),
    "attention": _choice("auto", "triton", "sdpa", "eager"),
    "fused": _choice("auto", "0", "1"),
    "trim": _choice("auto", "0", "1"),
    "prune": (_boolean, "0 or 1"),
    "compile": _choice("auto", "0", "1"),
    "overlap": _choice("auto", "0"),
    "skip_init": (_boolean, "0 or 1"),
    "checkpoint": _choice("auto", "none", "layer"),
    "save": _choice("model", "adapter"),
    "base": _choice("bf16", "int8", "nf4", "fp8"),
    "base_cache": (_boolean, "0 or 1"),
    "base_weights": (str, "the path of a checkpoint"),
    "adapters": (_pairs, "name=folder, with commas between, each name once"),
}


def switched_on(environ: Mapping[str, str] = os.environ) -> bool | None:
    """The value of `OPENPI_LORA`: True for 1, False for 0, None where it is unset or empty.

    Raises:
        SettingsError: any other value.
    """
    text = environ.get(SWITCH, "")
    if not text:
        return None
    return bool(_read(SWITCH, text, _boolean, "0 or 1"))


def read(environ: Mapping[str, str] = os.environ, **keywords: Any) -> Settings:
    """Settings from the environment, overridden by keywords of the same (lower-case) names.

    Raises:
        SettingsError: an unknown name, a value without meaning, or a variable that is misspelt.
    """
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if variable.startswith(f"{SWITCH}_"):
            values[variable.removeprefix(f"{SWITCH}_").lower()] = (variable, text)
    values |= {name: (f"activate({name}=...)", _as_text(value)) for name, value in keywords.items()}
    if unknown := sorted(source for name, (source, _) in values.items() if name not in _READERS):
        raise SettingsError(
            "Unknown openpi_lora_patch setting.",
            found=", ".join(unknown),
            expected=", ".join(f"{SWITCH}_{name.upper()}" for name in _READERS),
            fix="correct the spelling or remove it",
        )
    settings = Settings(**{name: _read(source, text, *_READERS[name]) for name, (source, text) in values.items()})
    if settings.parametrisation == "jax" and "freeze" not in values:
        return dataclasses.replace(settings, freeze="jax")
    return settings


def _as_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def _read(source: str, text: str, reader: Callable[[str], Any], expected: str) -> Any:
    try:
        return reader(text)
    except (KeyError, ValueError):
        raise SettingsError(
            f"{source} has a value without meaning.", found=repr(text), expected=expected, fix=f"set {source} so"
        ) from None
