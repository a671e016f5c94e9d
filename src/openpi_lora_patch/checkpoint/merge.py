"""Base plus adapter as one plain checkpoint that stock openpi loads: streamed, in float32, rounded once."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, LoRAError
from ..lora.config import LoRAConfig
from ..lora.quantized import require, round_trip
from . import adapters, files, peft
from .adapters import Adapter

# PaliGemma's head and embedding are one tensor, and a safetensors file has it under either name.
_TIED = {
    "paligemma_with_expert.paligemma.lm_head.weight": (
        "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    )
}


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What one merged weight lost by being stored in fewer bits.

    Attributes:
        worst: the largest absolute error of an element.
        mean: the mean absolute error.
        kept: how much of the adapter's change is in the stored weight, 1.0 being all: the change that is stored,
            projected on the change that was meant. NaN for an adapter that changes nothing.
        drift: norm of what the quantisation that the adapter was trained on changed, against the base weight's norm.
        requantized: norm of what rounding to a format for another quantised base changed, against the merged weight's.
    """

    worst: float
    mean: float
    kept: float
    drift: float = 0.0
    requantized: float = 0.0


def merge(
    base: files.Path,
    adapter: files.Path,
    out: files.Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: str = "",
    check_base: bool = True,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[str, Rounding]:
    """Write the folder `out`, whole or not at all, with one tensor of it in memory at a time.

    It gets `model.safetensors` and the adapter's `assets`, where training checkpoints have the normalisation that
    openpi's server asks for.

    Args:
        base: a plain checkpoint, or its folder.
        adapter: folder of an adapter.
        out: a folder that is not there yet.
        dtype: of the floating-point tensors of the result; None for the base's own.
        quantize: a format of `lora.quantized`, or "". What is merged is then rounded to what it holds, and stored as
            bfloat16: a base in that format, made from the result, is the result bit for bit.
        check_base: refuse a base other than the one that the adapter was trained on, where the adapter names it.
        progress: wraps the names that are being worked through.

    Returns:
        What rounding cost, by the Linear's name.

    Raises:
        CheckpointError: files that cannot be read or do not fit, another base, `out` is there, no space.
        LoRAError: `quantize` is no format that this machine makes, or comes with another dtype than bfloat16.
    """
    if quantize:
        _require_quantizable(quantize, dtype)
    taken = adapters.read_adapter(adapter)
    report: dict[str, Rounding] = {}
    with files.reading(files.weights_file(base)) as file:
        merging = Merging(file, taken)
        merging.require_fit(check_base)
        specs = {name: (dtype or own if own.is_floating_point else own, shape) for name, own, shape in merging.specs()}
        with files.creating(pathlib.Path(out)) as temporary:
            tensors = merging.tensors(
                progress(specs), {name: spec[0] for name, spec in specs.items()}, report, quantize
            )
            files.write_tensors(temporary / "model.safetensors", specs, tensors, file.metadata() or {"format": "pt"})
            if (assets := pathlib.Path(adapter, "assets")).is_dir():
                shutil.copytree(assets, temporary / "assets")
    return report


class Merging:
    """The tensors of a merged checkpoint, made one at a time from an open base file and an adapter."""

    def __init__(self, file: Any, adapter: Adapter) -> None:
        self.file = file
        self.names: list[str] = list(file.keys())
        # A policy's adapter goes onto the model inside it, and the other way round.
        self.adapter = adapter if self.in_policy else adapter.without_prefix("model.")
        self.configs: dict[str, LoRAConfig] = self.adapter.lora
        # What was trained beside a quantised base is added to that base, not to the one it was made from.
        self.quantization: str = adapter.metadata.get("quantization", "")
        if self.quantization:
            require(self.quantization)
        own = {tensor for name, config in self.configs.items() for tensor in peft.tensor_names(name, config)}
        self.replaced = {
            self._stored_name(name.removeprefix(peft.PREFIX)): tensor
            for name, tensor in self.adapter.tensors.items()
            if name not in own
        }

    def _stored_name(self, name: str) -> str:
        tied = _TIED | {two: one for one, two in _TIED.items()}
        return tied[name] if name not in self.names and tied.get(name) in self.names else name

    @property
    def in_policy(self) -> bool:
        """Whether the base is a policy of lerobot's, which has the model inside it."""
        return any(name.startswith("model.paligemma_with_expert.") for name in self.names)

    def specs(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        for name in self.names:
            piece = self.file.get_slice(name)
            if (dtype := piece.get_dtype()) not in files.TORCH_DTYPES:
                raise CheckpointError("A base tensor is of no dtype that is merged.", found=f"{name} {dtype}")
            yield name, files.TORCH_DTYPES[dtype], tuple(piece.get_shape())

    def require_fit(self, check_base: bool) -> None:
        shapes = {name: shape for name, _, shape in self.specs()}
        wanted = {name: tuple(tensor.shape) for name, tensor in self.replaced.items()}
        wrong = [f"{name} {shape}" for name, shape in wanted.items() if shapes.get(name) != shape]
        for name in self.configs:
            A, B = self.adapter.matrices(name)
            if shapes.get(f"{name}.weight") != (B.shape[0], A.shape[1]):
                wrong.append(f"{name} A {tuple(A.shape)} B {tuple(B.shape)}")
        if wrong or not self.configs:
            raise CheckpointError(
                "The adapter does not fit the base; nothing was written.",
                found="; ".join(wrong[:5]) or "no adapters",
                expected="tensors of the base's names and shapes",
                fix="give the plain base checkpoint that it was trained on",
            )
        adapters.require_finite(self.adapter.tensors)
        trained_on = self.adapter.metadata.get("base")
        weights = ((name, self.file.get_tensor(f"{name}.weight")) for name in self.configs)
        if check_base and trained_on is not None and (found := adapters.fingerprint(weights)) != trained_on:
            raise CheckpointError(
                "The adapter was trained on another base; nothing was written.", found=found, expected=trained_on
            )

    def tensors(
        self,
        names: Iterable[str],
        dtypes: Mapping[str, torch.dtype],
        report: dict[str, Rounding],
        quantize: str = "",
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors `names` in `dtypes`, see `merge`; what rounding cost is added to `report` on the way."""
        for name in names:
            linear = name.removesuffix(".weight")
            if linear in self.configs and name != linear:
                plain = self.file.get_tensor(name)
                weight = (round_trip(plain, self.quantization) if self.quantization else plain).float()
                delta = self.adapter.delta(linear, weight)
                merged = weight + delta
                stored = (round_trip(merged, quantize) if quantize else merged).to(dtypes[name])
                report[linear] = dataclasses.replace(
                    _rounding(weight, delta, stored),
                    drift=_distance(weight, plain),
                    requantized=_distance(stored, merged) if quantize else 0.0,
                )
                yield name, stored
            else:
                tensor = self.replaced[name] if name in self.replaced else self.file.get_tensor(name)
                yield name, tensor.to(dtypes[name])


def _require_quantizable(name: str, dtype: torch.dtype | None) -> None:
    require(name)
    if dtype is not torch.bfloat16:
        raise LoRAError(
            "What a quantised base computes with is bfloat16, and is stored as that.",
            found=f"quantize={name!r} and dtype={dtype}",
            expected="torch.bfloat16",
            fix="add --dtype bfloat16",
        )


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, against that of `wanted`."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def _rounding(weight: Tensor, delta: Tensor, stored: Tensor) -> Rounding:
    error = (stored.float() - (weight + delta)).abs()
    kept = ((stored.float() - weight) * delta).sum().double() / delta.square().sum().double()
    return Rounding(error.max().item(), error.mean().item(), kept.item())
