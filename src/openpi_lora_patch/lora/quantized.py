"""A frozen Linear whose weight is held in fewer bits, and made bfloat16 again each time that it is used.

    format   an element holds        scale                       source
    int8     an 8-bit integer        one a row                   torch
    fp8      a float8_e4m3fn         one a row                   torch
    nf4      a 4-bit NormalFloat     one in 64 elements          bitsandbytes; Dettmers et al. 2023, arXiv:2305.14314

What it is made bfloat16 to quantises to the same bits again, so a checkpoint that holds it loses nothing.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LoRAError

_BLOCK = 64
_SAMPLES = 512
_FP8 = torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight is held.

    Attributes:
        quantize: weight (out, in), bfloat16, to the data, of no floating-point dtype, and their scale, float32.
        dequantize: data, scale and the weight's shape to the weight, bfloat16.
        extra: a library that it needs, or "".
        capability: what a CUDA device must have.
    """

    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    dequantize: Callable[[Tensor, Tensor, tuple[int, int]], Tensor]
    extra: str = ""
    capability: tuple[int, int] = (0, 0)


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = _scale(weight, 127)
    return (weight / scale).round_().to(torch.int8), scale


def _to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = _scale(weight, torch.finfo(_FP8).max)
    # Held as bytes: a module's `.to(dtype)` casts whatever is floating.
    return (weight / scale).to(_FP8).view(torch.uint8), scale


def _scale(weight: Tensor, largest: float) -> Tensor:
    """The scale of each row, (out, 1); 1 for one of zeros."""
    largest_there = weight.abs().amax(1, keepdim=True).float()
    return torch.where(largest_there == 0, 1.0, largest_there / largest)


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    importlib.import_module("bitsandbytes")
    return torch.ops.bitsandbytes.quantize_4bit(weight.reshape(-1, _BLOCK), _BLOCK, "nf4", torch.uint8)


def _from_int8(data: Tensor, scale: Tensor, _: tuple[int, int]) -> Tensor:
    return torch.mul(data, scale, out=torch.empty_like(data, dtype=torch.bfloat16))


def _from_fp8(data: Tensor, scale: Tensor, _: tuple[int, int]) -> Tensor:
    # torch promotes float8 to nothing.
    wide = data.view(_FP8).to(torch.bfloat16)
    return torch.mul(wide, scale, out=wide)


def _from_nf4(data: Tensor, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    # In rows of a block: those of another length come out wrong from the CPU's kernel of bitsandbytes 0.50.2.
    blocks = (shape[0] * shape[1] // _BLOCK, _BLOCK)
    flat = torch.ops.bitsandbytes.dequantize_4bit(data, scale, _BLOCK, "nf4", blocks, torch.bfloat16)
    return flat.view(shape)


FORMATS = {
    "int8": Format(_to_int8, _from_int8),
    "fp8": Format(_to_fp8, _from_fp8, capability=(8, 9)),
    "nf4": Format(_to_nf4, _from_nf4, extra="bitsandbytes"),
}


def require(name: str) -> None:
    """Raise before anything is loaded, where a base cannot be held so here.

    Raises:
        LoRAError: the format is unknown, or a library or the CUDA device's capability is missing.
    """
    if name not in FORMATS:
        raise LoRAError("Unknown format of a base.", found=repr(name), expected=", ".join(FORMATS))
    chosen = FORMATS[name]
    if chosen.extra and importlib.util.find_spec(chosen.extra) is None:
        raise LoRAError(
            f"A base in {name} needs {chosen.extra}, which is not installed.",
            fix='pip install "openpi-lora-patch[quant]", or set OPENPI_LORA_BASE to int8',
        )
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < chosen.capability:
        raise LoRAError(
            f"This GPU cannot hold a base in {name}.",
            found=f"compute capability {found[0]}.{found[1]}",
            expected=f"{chosen.capability[0]}.{chosen.capability[1]} or newer",
            fix="set OPENPI_LORA_BASE to int8 or nf4",
        )


class Held(NamedTuple):
    """A weight as a `QuantizedLinear` has it; stands for it in a state dict that is loaded.

    Attributes:
        data, scale: see `Format`.
        source: `sample` of the weight that it was made from.
        shape: (out, in).
    """

    data: Tensor
    scale: Tensor
    source: Tensor
    shape: tuple[int, int]

    def detach(self) -> Held:
        """Itself, which has no gradient."""
        return self


class HeldLinear(nn.Module, abc.ABC):
    """A frozen Linear whose weight is no parameter, yet is in state dicts as one would be: `weight`, on the CPU.

    The layer itself, in a state dict that is loaded, stands for the weight that it has.

    Args:
        linear: without bias.

    Raises:
        LoRAError: a Linear with a bias.
    """

    requires_grad = False

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        if linear.bias is not None:
            raise LoRAError("A Linear with a bias is not held apart.", found=repr(linear))
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.bias = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    @property
    @abc.abstractmethod
    def weight(self) -> Tensor:
        """The weight (out, in)."""

    @abc.abstractmethod
    def _take(self, weight: Tensor) -> None:
        """Hold `weight` (out, in) from now on."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight.cpu()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, _: Any, strict: bool, missing: Any, unexpected: Any, errors: list[str]
    ) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is self:
            return
        if weight is None:
            missing.append(f"{prefix}weight")
        elif tuple(weight.shape) != self.shape:
            errors.append(f"size mismatch for {prefix}weight: {tuple(weight.shape)} for {self.shape}")
        else:
            self._take(weight.detach())


class UnusedLinear(HeldLinear):
    """In the place of a Linear that nothing calls; its weight stays in host memory, for checkpoints alone."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach()
        self._host = torch.zeros_like(weight, device="cpu") if weight.is_meta else weight.cpu()

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), on the CPU wherever the model is."""
        return self._host

    def _take(self, weight: Tensor) -> None:
        self._host = self._host.new_empty(self.shape).copy_(weight)


class QuantizedLinear(HeldLinear):
    """`x @ weight.T` with a frozen weight that is held in fewer bits; a gradient reaches x alone.

    Loading a weight quantises it on the device that the layer is on: a checkpoint is the same as without this, and the
    full weight of one layer at a time stands on the GPU.

    Args:
        linear: without bias; its weight is taken as bfloat16. While that is on the meta device, nothing is held.
        name: one of `FORMATS`.

    Raises:
        LoRAError: a Linear with a bias, or whose elements are no multiple of 64.
    """

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__(linear)
        _require_blocks(linear.weight)
        self.name: str = name
        if linear.weight.is_meta:
            self.source, self.data, self.scale = torch.empty(3, 0, dtype=torch.uint8)
        else:
            self._hold(linear.weight.detach(), linear.weight.device)

    def _hold(self, weight: Tensor, device: torch.device) -> None:
        self.source = sample(weight)
        # A CPU takes minutes for what a GPU does in a second.
        there = torch.device("cuda") if torch.cuda.is_available() and device.type == "cpu" else device
        held = FORMATS[self.name].quantize(weight.to(there).to(torch.bfloat16))
        self.data, self.scale = (tensor.to(device) for tensor in held)

    @property
    def dtype(self) -> torch.dtype:
        """Of `weight`, at no cost."""
        return torch.bfloat16

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), bfloat16, made anew each time; on the meta device as long as none is held."""
        if not self.data.numel():
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return FORMATS[self.name].dequantize(self.data, self.scale, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in), bfloat16, to (..., out)."""
        return cast(Tensor, _Product.apply(x, self.data, self.scale, self.name, self.shape))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.name}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Neither parameters, which optimizers and casts reach, nor buffers, which state dicts would hold.
        self.data = fn(self.data)
        self.scale = self.scale.to(self.data.device)
        return super()._apply(fn, recurse)

    def _take(self, weight: Tensor | Held) -> None:
        if isinstance(weight, Held):
            self.data, self.scale = (part.to(self.data.device, copy=True) for part in (weight.data, weight.scale))
            self.source = weight.source.clone()
        else:
            self._hold(weight, self.data.device)


class _Product(torch.autograd.Function):
    """`x @ weight.T`; the weight is made again for the backward pass, where keeping it would cost what it saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, data: Tensor, scale: Tensor, name: str, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(data, scale)
        ctx.name, ctx.shape = name, shape
        return F.linear(x, FORMATS[name].dequantize(data, scale, shape).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        data, scale = ctx.saved_tensors
        weight = FORMATS[ctx.name].dequantize(data, scale, ctx.shape)
        return grad @ weight.to(grad.dtype), None, None, None, None


def quantize(layers: Iterable[Any], name: str) -> None:
    """Hold the bases of these `LoRALinear`s in the format `name`, one after the other."""
    for layer in layers:
        layer.base_layer = QuantizedLinear(layer.base_layer, name)
        layer.follow_base()


def round_trip(weight: Tensor, name: str) -> Tensor:
    """What a base in the format `name` makes of a weight (out, in): bfloat16.

    Raises:
        LoRAError: its elements are no multiple of 64.
    """
    _require_blocks(weight)
    held = FORMATS[name].quantize(weight.to(torch.bfloat16))
    return FORMATS[name].dequantize(held[0], held[1], (weight.shape[0], weight.shape[1]))


def _require_blocks(weight: Tensor) -> None:
    if weight.numel() % _BLOCK:
        raise LoRAError(
            "A quantised weight is whole blocks.", found=f"{tuple(weight.shape)}", expected=f"of {_BLOCK} elements"
        )


def stored_weight(linear: Any) -> Any:
    """The weight of a Linear, with an adapter or without: a tensor, or the `QuantizedLinear` that makes it anew.

    Either has `shape`, `dtype` and `requires_grad`.
    """
    base = getattr(linear, "base_layer", linear)
    return base if isinstance(base, QuantizedLinear) else base.weight


def dense(weight: Any) -> Tensor:
    """A `stored_weight` as a tensor (out, in)."""
    return weight.weight if isinstance(weight, QuantizedLinear) else weight


def sample(weight: Tensor | QuantizedLinear) -> Tensor:
    """Some hundred values of a weight, bfloat16, on the CPU; of a quantised one, those that it had before."""
    if isinstance(weight, QuantizedLinear):
        return weight.source
    values = weight.detach().reshape(-1)
    return values[:: -(-values.numel() // _SAMPLES) or 1].to(torch.bfloat16).cpu().contiguous()
