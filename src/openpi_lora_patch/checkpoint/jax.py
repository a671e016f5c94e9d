"""Checkpoints of openpi's JAX code as PyTorch adapters, or merged. Needs tensorstore, and neither JAX nor openpi."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..lora.config import LoRAConfig
from . import adapters, files, peft
from .jax_layout import (
    EMBEDDING,
    EXPERT_HEAD,
    PROJECTOR,
    TOWERS,
    VISION,
    Named,
    as_linears,
    base_tensors,
    lora_names,
    scaling,
    split,
)
from .orbax import JaxCheckpoint


def convert(
    checkpoint: files.Path,
    out: files.Path,
    *,
    openpi_config: str | None = None,
    alpha: tuple[float, float] | None = None,
    rslora: bool = False,
    merged: torch.dtype | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Write an adapter folder, with heads, SigLIP and projector; or with `merged` a plain `model.safetensors`.

    Args:
        checkpoint: of openpi's JAX training.
        out: a folder that is not there yet.
        openpi_config: name of the training config, for the reader.
        alpha: of the attention adapters of PaliGemma and of the expert; by default the rank, as openpi's variants have.
        rslora: whether attention divides alpha by sqrt(rank).
        merged: dtype of a merged checkpoint; None for adapters.
        progress: wraps the names that are being worked through.

    Raises:
        CheckpointError: a checkpoint that cannot be read, has no LoRA to make adapters of, or holds unknown tensors;
            `out` is there; no space.
    """
    source = JaxCheckpoint(checkpoint)
    lora = _Lora(source, alpha, rslora)
    if merged is not None:
        _write_merged(source, lora, pathlib.Path(out), merged, progress)
    else:
        _write_adapter(source, lora, pathlib.Path(out), openpi_config, progress)


class _Lora:
    """The adapters of a JAX checkpoint."""

    def __init__(self, source: JaxCheckpoint, alpha: tuple[float, float] | None, rslora: bool) -> None:
        self.source, self.alpha, self.rslora = source, alpha, rslora
        self.bases = [name for name in source.shapes if lora_names(name)[0] in source.shapes]

    def pairs(self, base: str, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """Name of the Linear, A (rank, in), B (out, rank) and scaling, for each Linear that the tensor `base` holds."""
        if base not in self.bases:
            return
        stacks = [read(name).float() for name in lora_names(base)]
        kind, suffix = split(base)
        factor = scaling(kind, suffix, stacks[0].shape[-1], self.alpha, self.rslora)
        for layer, (a, b) in enumerate(zip(*stacks, strict=True)):
            for linear, (A, B) in as_linears(kind, a, b).items():
                yield f"{TOWERS[suffix]}.layers.{layer}.{linear}", A, B, factor


def _bases(source: JaxCheckpoint) -> list[str]:
    return [name for name in source.shapes if not name.endswith(("lora_a", "lora_b"))]


def _merged_tensors(source: JaxCheckpoint, lora: _Lora, names: Iterable[str], read: Callable[[str], Tensor]) -> Named:
    for name in names:
        tensor = read(name)
        deltas = {f"{linear}.weight": (A, B, factor) for linear, A, B, factor in lora.pairs(name, read)}
        for own, value in base_tensors(name, tensor):
            if own in deltas:
                A, B, factor = deltas[own]
                value = value.float() + factor * (B @ A)
            yield own, value
        if name == "PaliGemma/llm/embedder/input_embedding":
            width = source.shapes["PaliGemma/llm/layers/attn/q_einsum_1/w"][2]
            yield EXPERT_HEAD, tensor.new_zeros(tensor.shape[0], width)


def _trained_tensors(lora: _Lora, names: Iterable[str], read: Callable[[str], Tensor]) -> Named:
    """The adapters, and what openpi's JAX LoRA runs train besides: SigLIP, projector, heads, a tower without any."""
    adapted = {split(base)[1] for base in lora.bases}
    for name in names:
        for linear, A, B, _ in lora.pairs(name, read):
            yield peft.tensor_name(linear, "lora_A"), A
            yield peft.tensor_name(linear, "lora_B"), B
        if not name.startswith("PaliGemma/llm/") or split(name)[1] not in adapted:
            for own, value in base_tensors(name, read(name)):
                # Saved by module: the embedding goes by its name in the tower, not by that of the head tied to it.
                yield peft.PREFIX + own.replace(EMBEDDING, f"{TOWERS['']}.embed_tokens.weight"), value.float()


def _write_merged(
    source: JaxCheckpoint, lora: _Lora, out: pathlib.Path, dtype: torch.dtype, progress: Callable[..., Iterable[str]]
) -> None:
    names = _bases(source)
    planned = _planned(_merged_tensors(source, lora, names, _shape_only(source)))
    specs = {name: (dtype, shape) for name, (_, shape) in planned.items()}
    with files.creating(out) as temporary:
        tensors = _merged_tensors(source, lora, progress(names), source.read)
        cast = ((name, tensor.to(dtype)) for name, tensor in tensors)
        files.write_tensors(temporary / "model.safetensors", specs, cast, {"format": "pt"})


def _write_adapter(
    source: JaxCheckpoint,
    lora: _Lora,
    out: pathlib.Path,
    openpi_config: str | None,
    progress: Callable[..., Iterable[str]],
) -> None:
    if not lora.bases:
        raise CheckpointError("The JAX checkpoint holds no adapters.", fix="convert it merged, as a base checkpoint")
    names, shape_only = _bases(source), _shape_only(source)
    specs = _planned(_trained_tensors(lora, names, shape_only))
    configs = {
        linear: LoRAConfig(rank=A.shape[0], alpha=factor * A.shape[0])
        for base in lora.bases
        for linear, A, _, factor in lora.pairs(base, shape_only)
    }
    metadata = {
        "version": adapters.version(),
        "base": adapters.fingerprint(_adapted_weights(source, lora, configs)),
        "preset": "jax",
        "model": {"pi05": any(name.startswith("time_mlp") for name in names)},
        "openpi_config": openpi_config,
    }
    config = peft.describe(configs, _saved_modules(specs))
    with files.creating(out) as temporary:
        (temporary / adapters.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        header = {"format": "pt", adapters.METADATA: json.dumps(metadata, sort_keys=True)}
        tensors = _trained_tensors(lora, progress(names), source.read)
        files.write_tensors(temporary / adapters.WEIGHTS, specs, tensors, header)


def _planned(tensors: Named) -> dict[str, files.Spec]:
    """Dtype and shape by name, of tensors without values."""
    try:
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}
    except (IndexError, RuntimeError, ValueError) as error:
        raise CheckpointError("The tensors have not the shapes of openpi's models.", found=str(error)[:500]) from None


def _adapted_weights(source: JaxCheckpoint, lora: _Lora, configs: Mapping[str, LoRAConfig]) -> Named:
    for base in lora.bases:
        for name, tensor in base_tensors(base, source.read(base)):
            if name.removesuffix(".weight") in configs:
                yield name.removesuffix(".weight"), tensor


def _saved_modules(names: Iterable[str]) -> list[str]:
    plain = [name.removeprefix(peft.PREFIX) for name in names if ".lora_" not in name]
    heads = {name.partition(".")[0] for name in plain if not name.startswith("paligemma_with_expert.")}
    parts = (VISION, PROJECTOR, *TOWERS.values())
    towers = {module for module in parts for name in plain if name.startswith(f"{module}.")}
    return sorted(heads | towers)


def _shape_only(source: JaxCheckpoint) -> Callable[[str], Tensor]:
    return lambda name: torch.empty(source.shapes[name], dtype=torch.float32, device="meta")
