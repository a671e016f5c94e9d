"""What a checkpoint is, and how strong its adapters are."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import adapters, files, peft
from .orbax import JaxCheckpoint

Progress = Callable[[Iterable[str]], Iterable[str]]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a file or folder is.

    Attributes:
        kind: one line.
        needs: what it takes to load it.
        facts: more about it, by name.
        deltas: for each Linear with an adapter, its rank and the Frobenius norm of `scaling * B A`; None for the norm
            where the scaling is not in the file.
    """

    kind: str
    needs: str
    facts: dict[str, str]
    deltas: dict[str, tuple[int, float | None]] = dataclasses.field(default_factory=dict)


def describe(path: files.Path, *, progress: Progress = iter) -> Description:
    """Say what `path` is; weights of a base are not read, only their names.

    Args:
        path: file or folder.
        progress: wraps the names of the Linears whose adapters are being worked through.

    Raises:
        CheckpointError: nothing there that can be read, or nothing that is a checkpoint.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} is not there.")
    if any((folder / "manifest.ocdbt").exists() for folder in (path, path / "params")):
        return _jax(JaxCheckpoint(path))
    if path.name == adapters.WEIGHTS:
        path = path.parent
    if (path / adapters.WEIGHTS).exists():
        return _adapter(adapters.read_adapter(path), progress)
    return _file(files.weights_file(path), progress)


def _jax(source: JaxCheckpoint) -> Description:
    ranks = sorted({shape[-1] for name, shape in source.shapes.items() if name.endswith("lora_a")})
    facts = {"tensors": str(len(source.shapes)), "values": f"{_count(source.shapes.values()):,}"}
    if not ranks:
        return Description(
            "JAX checkpoint of openpi, without LoRA", "openpi's JAX code, or convert jax --merged", facts
        )
    facts["ranks"] = ", ".join(map(str, ranks))
    return Description("JAX checkpoint of openpi, with LoRA", "openpi's JAX code, or convert jax", facts)


def _adapter(adapter: adapters.Adapter, progress: Progress) -> Description:
    ours = "version" in adapter.metadata
    facts = {name: str(value) for name, value in adapter.metadata.items() if value not in (None, {})}
    facts["values"] = f"{_count(tuple(tensor.shape) for tensor in adapter.tensors.values()):,}"
    facts["modules saved whole"] = ", ".join(adapter.config.get("modules_to_save") or ()) or "none"
    kind = "adapter of openpi_lora_patch, in PEFT's format" if ours else "adapter that PEFT saved"
    base = "the base with this fingerprint" if ours else "its base, which the file does not name"
    try:
        configs = adapter.lora
    except CheckpointError as error:
        return Description(kind, f"PEFT; not this package: {' '.join(str(error).split())}", facts)
    deltas: dict[str, tuple[int, float | None]] = {}
    for name in progress(configs):
        A, B = adapter.matrices(name)
        deltas[name] = configs[name].rank, configs[name].scaling * _norm_of_product(B.float(), A.float())
    facts["ranks"] = ", ".join(map(str, sorted({rank for rank, _ in deltas.values()})))
    if any(config.use_dora for config in configs.values()):
        facts["use_dora"] = "True; the norms are those of the directions' change, scaling * B A"
    return Description(kind, f"{base}, and load_adapter() or PEFT", facts, deltas)


def _file(path: pathlib.Path, progress: Progress) -> Description:
    with files.reading(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if adapters.METADATA in shapes:
        found = _adapter(adapters.read_training_file(path), progress)
        needs = "OPENPI_LORA_BASE_WEIGHTS, with openpi's scripts; convert training makes an adapter folder of it"
        return dataclasses.replace(found, kind="training checkpoint with adapters only", needs=needs)
    facts = {"tensors": str(len(shapes)), "values": f"{_count(shapes.values()):,}"}
    deltas: dict[str, tuple[int, float | None]] = {
        name.partition(".lora_A")[0]: (min(shape, default=0), None)
        for name, shape in shapes.items()
        if ".lora_A" in name
    }
    pi0 = any("paligemma_with_expert." in name for name in shapes)
    if any(name.endswith(peft.MAGNITUDE) for name in shapes):
        facts["use_dora"] = "True"
    if deltas and pi0 and any(name.endswith(".base_layer.weight") for name in shapes):
        return Description("whole pi0 or pi0.5 with adapters", "the *_lora variants it was trained with", facts, deltas)
    if any("lora" in name.lower() for name in shapes):
        needs = "what wrote it: there is no adapter_config.json beside it, or it names its tensors otherwise"
        return Description("somebody else's LoRA", needs, facts, deltas)
    if pi0:
        return Description("base checkpoint of pi0 or pi0.5", "openpi or lerobot, as it is", facts)
    return Description("safetensors file of some other model", "what wrote it", facts)


def _norm_of_product(B: Tensor, A: Tensor) -> float:
    """Frobenius norm of B A, without making it: (out, r) and (r, in)."""
    squared = ((B.T.double() @ B.double()) * (A.double() @ A.T.double())).sum()
    return torch.sqrt(squared.clamp(min=0)).item()


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)
