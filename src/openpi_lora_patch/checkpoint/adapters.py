"""Adapter checkpoints: the adapters and whatever else trains, in PEFT's format, without the base.

A folder holds `adapter_model.safetensors` and `adapter_config.json`. The metadata of the first say which base weights
the adapters were trained on, so that no other base is taken for them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..distributed import fill, whole
from ..errors import CheckpointError, LoRAError
from ..lora.config import LoRAConfig
from ..lora.dora import with_magnitude
from ..lora.inject import adapted, lora_layers
from ..lora.layer import LoRALinear
from ..lora.quantized import QuantizedLinear, sample, stored_weight
from . import files, peft

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
METADATA = "openpi_lora_patch"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter checkpoint holds.

    Attributes:
        config: PEFT's `adapter_config.json`.
        tensors: by PEFT's names; adapters float32 (r, in), (out, r) and (out), saved modules in their own dtype.
        metadata: `version`, `base`, `preset`, `model` and `openpi_config` where we wrote it, empty where PEFT did.

    Raises:
        CheckpointError: `modules_to_save` or `model` is not of PEFT's or our form.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    def __post_init__(self) -> None:
        saved, model = self.config.get("modules_to_save") or [], self.metadata.get("model", {})
        if not (isinstance(saved, list) and all(isinstance(name, str) and name for name in saved)):
            raise CheckpointError("An adapter_config.json has no meaning.", found=f"modules_to_save={saved!r:.200}")
        if not isinstance(model, dict):
            raise CheckpointError("An adapter's metadata have no meaning.", found=f"model={model!r:.200}")

    @functools.cached_property
    def lora(self) -> dict[str, LoRAConfig]:
        """The adapter of each Linear, by its full name.

        Raises:
            CheckpointError: neither LoRA nor DoRA.
        """
        return peft.lora_configs(self.config, peft.adapted_modules(self.tensors))

    def matrices(self, linear: str) -> tuple[Tensor, Tensor]:
        """`lora_A` (r, in) and `lora_B` (out, r) of one of the Linears in `lora`.

        Raises:
            CheckpointError: a tensor of its adapter is missing, or they do not fit the configuration and each other.
        """
        config = self.lora[linear]
        names = peft.tensor_names(linear, config)
        if absent := [name for name in names if name not in self.tensors]:
            raise CheckpointError("An adapter lacks a matrix.", found=f"no {absent[0]}")
        A, B, *magnitude = (self.tensors[name] for name in names)
        fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] == config.rank
        if not fits or any(vector.shape != B.shape[:1] for vector in magnitude):
            raise CheckpointError(
                "The tensors of an adapter do not fit each other.",
                found=f"{linear} {', '.join(str(tuple(t.shape)) for t in (A, B, *magnitude))} for rank {config.rank}",
                expected="A (rank, in), B (out, rank) and, with DoRA, a magnitude (out)",
            )
        return A, B

    def delta(self, linear: str, weight: Tensor) -> Tensor:
        """What the adapter of one of the Linears in `lora` adds to its base weight (out, in), float32.

        Raises:
            CheckpointError: see `matrices`.
        """
        A, B = self.matrices(linear)
        config = self.lora[linear]
        delta = config.scaling * (B.float() @ A.float())
        if not config.use_dora:
            return delta
        return with_magnitude(weight, delta, self.tensors[peft.tensor_name(linear, peft.MAGNITUDE)].float())

    def without_prefix(self, prefix: str) -> Adapter:
        """The same for a model that lies at `prefix` of the saved one (lerobot's policy has it at "model.")."""
        tensors = {
            peft.PREFIX + name.removeprefix(peft.PREFIX).removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
        }
        saved = [name.removeprefix(prefix) for name in self.config.get("modules_to_save") or ()]
        return dataclasses.replace(self, tensors=tensors, config=self.config | {"modules_to_save": saved or None})


def save_adapter(model: nn.Module, folder: files.Path | None, *, openpi_config: str | None = None) -> None:
    """Write the adapters of `model` and whatever else trains in it, whole or not at all.

    Args:
        model: one with adapters.
        folder: made where it is not there. One that holds an adapter of the same configuration has it replaced. None
            writes nothing: a model that is spread over processes is gathered, which takes a call from each of them.
        openpi_config: name of the training config, for the reader.

    Raises:
        CheckpointError: no adapters, NaN, an adapter of another configuration in the folder, a file system that
            refuses.
    """
    adapter = take(model, openpi_config)
    if folder is not None:
        write_adapter(adapter, folder)


def load_adapter(model: nn.Module, folder: files.Path, *, check_base: bool = True) -> None:
    """Load adapters that were saved by `save_adapter`, PEFT, or lerobot through PEFT. On an error nothing changes.

    Args:
        model: one with the same adapters, or one without any, which gets them.
        folder: holds `adapter_model.safetensors` and `adapter_config.json`.
        check_base: refuse a base other than the one that the adapters were trained on, where the file names it.

    Raises:
        CheckpointError: another base, another rank or scaling, tensors that are missing, unexpected, of another shape
            or not finite, a file that cannot be read, or neither LoRA nor DoRA.
    """
    adapter = fitting(model, read_adapter(folder), check_base=check_base)
    if not lora_layers(model):
        for name, config in adapter.lora.items():
            parent, _, child = name.rpartition(".")
            linear = model.get_submodule(name)
            # This one alone: there may be others of its name further below.
            setattr(model.get_submodule(parent), child, adapted(linear, config))
    with torch.no_grad():
        for name, target in targets(model, adapter).items():
            fill(target, adapter.tensors[name])


def take(model: nn.Module, openpi_config: str | None = None) -> Adapter:
    """The adapters of `model` and whatever else trains in it; the tensors are the model's own.

    Raises:
        CheckpointError: it has none, or a value that is not finite.
    """
    layers = lora_layers(model)
    if not layers:
        raise CheckpointError("There is no adapter to save.", found=f"{type(model).__name__} without adapters")
    if any(layer.merged for layer in layers.values()):
        raise CheckpointError("A merged adapter cannot be saved: the base would hold it too.", fix="call unmerge()")
    saved = trained_modules(model)
    config = peft.describe({name: layer.config for name, layer in layers.items()}, saved)
    tensors = {name: whole(tensor.detach()) for name, tensor in _whole(model, saved).items()}
    for name, layer in layers.items():
        for own in peft.parameters(layer.config):
            tensors[peft.tensor_name(name, own)] = whole(getattr(layer, own).detach())
    require_finite(tensors)
    metadata = {
        "version": version(),
        "base": fingerprint((name, stored_weight(layer)) for name, layer in layers.items()),
        "preset": getattr(model, "lora_preset", None),
        "model": _sizes(model),
        "openpi_config": openpi_config,
    }
    formats = {layer.base_layer.name for layer in layers.values() if isinstance(layer.base_layer, QuantizedLinear)}
    if formats:
        metadata["quantization"] = formats.pop()
    return Adapter(config, tensors, metadata)


def write_adapter(adapter: Adapter, folder: files.Path) -> None:
    """Write an adapter's two files; see `save_adapter`."""
    folder = pathlib.Path(folder)
    text = json.dumps(adapter.config, indent=2, sort_keys=True) + "\n"
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter.tensors.items()}
    metadata = {"format": "pt", METADATA: json.dumps(adapter.metadata, sort_keys=True)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    if not folder.exists():
        with files.creating(folder) as temporary:
            files.require_space(temporary, size)
            (temporary / CONFIG).write_text(text)
            save_file(tensors, temporary / WEIGHTS, metadata)
            # safetensors makes files that nobody but their owner may read.
            shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)
        return
    # Two files cannot be replaced at one instant, so the configuration has to stay.
    if not (folder / CONFIG).exists() or (folder / CONFIG).read_text() != text:
        raise CheckpointError(
            f"{folder} is there, and is not an adapter of the same configuration.",
            expected="a new folder, or one with the same ranks and modules",
            fix="save under another name",
        )
    with files.replacing(folder / WEIGHTS) as file:
        files.require_space(file, size)
        save_file(tensors, file, metadata)
        shutil.copymode(folder / CONFIG, file)


def read_adapter(folder: files.Path) -> Adapter:
    """Read an adapter folder, of ours or PEFT's, or a training checkpoint with adapters only.

    Raises:
        CheckpointError: no such folder, or a file in it cannot be read.
    """
    folder = pathlib.Path(folder)
    if not (folder / WEIGHTS).exists():
        return read_training_file(files.weights_file(folder))
    with files.reading(folder / WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        text = (file.metadata() or {}).get(METADATA, "{}")
    metadata = files.parse_json(text, f"The metadata of {folder / WEIGHTS}")
    return Adapter(files.read_json(folder / CONFIG), tensors, metadata)


def read_training_file(path: pathlib.Path) -> Adapter:
    """Read a `model.safetensors` that a training run wrote with `OPENPI_LORA_SAVE=adapter`.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    with files.reading(path) as file:
        names = set(file.keys())
        if METADATA not in names:
            raise CheckpointError(f"{path} is no adapter checkpoint.", expected=f"{WEIGHTS} and {CONFIG}")
        return from_state_dict({name: file.get_tensor(name) for name in names})


def to_state_dict(adapter: Adapter) -> dict[str, Tensor]:
    """One dictionary of tensors that holds everything of an adapter, for writers that keep nothing but tensors."""
    text = json.dumps({"config": adapter.config, "metadata": adapter.metadata}, sort_keys=True)
    return adapter.tensors | {METADATA: torch.tensor(list(text.encode()), dtype=torch.uint8)}


def from_state_dict(state_dict: Mapping[str, Tensor]) -> Adapter:
    """The inverse of `to_state_dict`.

    Raises:
        CheckpointError: its description is damaged.
    """
    tensors = dict(state_dict)
    text = tensors.pop(METADATA).cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    header = files.parse_json(text, f"The tensor {METADATA}")
    config, metadata = header.get("config"), header.get("metadata")
    if not (isinstance(config, dict) and isinstance(metadata, dict)):
        raise CheckpointError(f"The tensor {METADATA} describes no adapter.", found=", ".join(header) or "nothing")
    return Adapter(config, tensors, metadata)


def fitting(
    model: nn.Module, adapter: Adapter, *, check_base: bool = True, base: Mapping[str, Tensor] | None = None
) -> Adapter:
    """`adapter` under the names of `model`, for its `targets`, once it is certain that it can be loaded there.

    Args:
        model: see `load_adapter`.
        adapter: what was read.
        check_base: see `load_adapter`.
        base: the base weights by Linear, where they are not the ones that the model has now.

    Raises:
        CheckpointError: see `load_adapter`.
    """
    if any(layer.merged for layer in lora_layers(model).values()):
        raise CheckpointError("A merged model takes no adapter: it would keep the one it holds.", fix="call unmerge()")
    modules = dict(model.named_modules())
    prefix = next((p for p in ("", "model.") if _lies_in(modules, adapter, p)), "")
    adapter = adapter.without_prefix(prefix)
    configs, layers = adapter.lora, lora_layers(model)
    absent = [name for name in configs if not hasattr(modules.get(name), "in_features")]
    if absent or not configs:
        raise CheckpointError(
            "The adapter is not for this model.",
            found=f"adapters on {_some(absent)}, which are no Linears of {type(model).__name__}",
            expected="adapters on Linears of the model",
        )
    _require_same_layers(layers, configs)
    _require_same_tensors(model, adapter, configs)
    require_finite(adapter.tensors)
    if check_base and (wanted := adapter.metadata.get("base")) is not None:
        found = fingerprint((base or {name: stored_weight(modules[name]) for name in configs}).items())
        if found != wanted:
            raise CheckpointError(
                "The adapter was trained on another base.",
                found=f"base weights with fingerprint {found}",
                expected=wanted,
                fix="first load the base checkpoint that it was trained on (OPENPI_LORA_BASE_WEIGHTS in serving)",
            )
    return _in_parameters_of(layers, adapter)


def fingerprint(weights: Iterable[tuple[str, Any]]) -> str:
    """What tells base weights apart: a hash of some hundred values of each, rounded to bfloat16.

    It is the same for a float32 checkpoint and for what bfloat16 makes of it, and in whatever order they come.

    Args:
        weights: name and `stored_weight` (out, in) of each Linear that has an adapter; of a quantised one counts the
            weight that it was made from.
    """
    digests = []
    for name, weight in weights:
        weight = weight if isinstance(weight, QuantizedLinear) else whole(weight.detach())
        text = f"{name} {tuple(weight.shape)}".encode()
        digests.append(hashlib.sha256(text + sample(weight).view(torch.uint8).numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:32]


def version() -> str:
    """This package's."""
    return str(importlib.import_module(__package__.partition(".")[0]).__version__)


def trained_modules(model: nn.Module) -> list[str]:
    """The topmost modules that train but for adapters: whole where all of it trains, else the ones inside."""
    found = []

    def visit(name: str, module: nn.Module) -> None:
        own = list(module.parameters(recurse=False))
        everything = list(module.parameters())
        if isinstance(module, LoRALinear) or not everything:
            return
        whole = name and all(p.requires_grad for p in everything) and not lora_layers(module)
        if whole or any(p.requires_grad for p in own):
            found.append(name)
            return
        for child, inner in module.named_children():
            visit(f"{name}.{child}".lstrip("."), inner)

    visit("", model)
    return found


def _expected(model: nn.Module, configs: Mapping[str, LoRAConfig], saved: list[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter checkpoint's tensors, by PEFT's names; a tensor shared by two modules is there once."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, config in configs.items():
        linear: Any = model.get_submodule(name)
        own: list[tuple[int, ...]] = [(config.rank, linear.in_features), (linear.out_features, config.rank)]
        own += [(linear.out_features,)] * config.use_dora
        shapes.update(zip(peft.tensor_names(name, config), own, strict=True))
    return shapes | {name: tuple(tensor.shape) for name, tensor in _whole(model, saved).items()}


def _whole(model: nn.Module, saved: list[str]) -> dict[str, Tensor]:
    return {
        f"{peft.PREFIX}{name}.{own}": tensor for name in saved for own, tensor in _distinct(model.get_submodule(name))
    }


def targets(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """What each tensor of a fitting adapter is copied to."""
    targets = _whole(model, _saved_modules(model, adapter))
    for name, layer in lora_layers(model).items():
        targets.update(zip(peft.tensor_names(name, layer.config), layer.parameters(recurse=False), strict=True))
    return targets


def _in_parameters_of(layers: Mapping[str, LoRALinear], adapter: Adapter) -> Adapter:
    """The same with each B as the parameter that the model has for it."""
    names = {name: peft.tensor_name(name, "lora_B") for name in layers}
    try:
        values = {names[name]: layer.parameter_for(adapter.tensors[names[name]]) for name, layer in layers.items()}
    except LoRAError as error:
        raise CheckpointError("The adapter is of another parametrisation; nothing was loaded.\n" + str(error)) from None
    return dataclasses.replace(adapter, tensors=adapter.tensors | values)


def _saved_modules(model: nn.Module, adapter: Adapter) -> list[str]:
    """The modules that the adapter's configuration saves whole; PEFT gives the ends of their names."""
    ends = tuple(f".{end}" for end in adapter.config.get("modules_to_save") or ())
    found: list[str] = []
    for name, _ in model.named_modules():
        if f".{name}".endswith(ends) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _require_same_tensors(model: nn.Module, adapter: Adapter, configs: Mapping[str, LoRAConfig]) -> None:
    expected = _expected(model, configs, _saved_modules(model, adapter))
    found = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    shapes = [
        f"{name} {found[name]} for {expected[name]}"
        for name in found.keys() & expected
        if found[name] != expected[name]
    ]
    if found.keys() != expected.keys() or shapes:
        raise CheckpointError(
            "An adapter checkpoint does not fit the model; nothing was loaded.",
            found=f"missing: {_some(expected.keys() - found)}; unexpected: {_some(found.keys() - expected)}; "
            f"of another shape: {_some(shapes)}",
            expected="the tensors that its configuration and the model call for",
        )


def _distinct(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _lies_in(modules: Mapping[str, nn.Module], adapter: Adapter, prefix: str) -> bool:
    names = peft.adapted_modules(adapter.tensors)
    return all(name.startswith(prefix) and name.removeprefix(prefix) in modules for name in names)


def _require_same_layers(layers: Mapping[str, LoRALinear], configs: Mapping[str, LoRAConfig]) -> None:
    if not layers:
        return
    if layers.keys() != configs.keys():
        raise CheckpointError(
            "The adapter is for other Linears than the model has adapters on.",
            found=f"only in the file: {_some(configs.keys() - layers)}; only there: {_some(layers.keys() - configs)}",
            expected=f"the {len(layers)} Linears of the model",
            fix="use the variants that it was trained with",
        )
    other = [
        f"{name} has rank {config.rank}, scaling {config.scaling:g} and use_dora {config.use_dora}, "
        f"the model is {type(layers[name]).__name__}({layers[name].extra_repr()})"
        for name, config in configs.items()
        if not peft.same_function(config, layers[name].config)
    ]
    if other:
        raise CheckpointError(
            "The adapter has another rank or scaling than the model, or one of the two is DoRA.",
            found=_some(other),
            expected="the model's",
            fix="use the variants that it was trained with, with OPENPI_LORA_PARAMETRISATION=jax if that was JAX, and "
            "OPENPI_LORA_DORA=1 if that was DoRA; or load it into a model without adapters",
        )


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for NaN, infinities, what float32 makes infinite, and what is no real number at all."""
    if broken := [
        name
        for name, tensor in tensors.items()
        if not (tensor.is_floating_point() and torch.isfinite(tensor.float()).all())
    ]:
        raise CheckpointError("An adapter holds values that are not finite.", found=_some(broken), expected="numbers")


def _sizes(model: nn.Module) -> dict[str, Any]:
    wanted = ("pi05", "paligemma_variant", "action_expert_variant", "action_dim", "action_horizon")
    config = getattr(model, "config", None)
    values = {name: getattr(config, name, None) for name in wanted}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | str)}


def _some(names: Any) -> str:
    names = sorted(names)
    return "; ".join(names[:5]) + (f"; and {len(names) - 5} more" if len(names) > 5 else "") or "none"
