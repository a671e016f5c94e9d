"""Both towers of a pi0 or pi0.5 in one pass, layer by layer, attending to each other's tokens: the training forward.

What it does not do, against `PaliGemmaWithExpertModel.forward`: build the rotary angles and a dummy tensor in every
layer, copy residuals, checkpoint what is checkpointed again inside, and compute what cannot reach the loss.

Source: openpi, `models_pytorch/gemma_pytorch.py` (commit 15a9616); behaviour only.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..lora import kernels, pointwise
from ..lora.dora import DoRALinear
from ..lora.quantized import stored_weight
from ..patches.gemma import gated_residual
from ..settings import Settings
from . import shared_attention, streams
from .attention import Eager, Fused, Prefix, Shared

logger = logging.getLogger("openpi_lora_patch")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a forward is computed; every choice gives the same function.

    Attributes:
        attention: "eager", transformers' function, as openpi does; "sdpa", torch's fused kernels; or "triton", those
            and our own for the prefix, where its tokens attend to all of it and all heads share keys and values.
        fused: Linears and MLPs by the functions in `lora.kernels`, where their weights are frozen.
        trim: leave out cameras and prompt padding that are masked in the whole batch.
        prune: leave out the part of the last prefix layer that nothing reads.
        compile: a frozen vision tower by `torch.compile`.
        overlap: what the two towers do apart from each other at once, see `models.streams`; for one process alone.
        checkpoint: "none", "layer" or "auto": whether layers are computed again in the backward pass; auto does so
            for as few as the free memory allows.
    """

    attention: str
    fused: bool
    trim: bool
    prune: bool
    compile: bool
    overlap: bool
    checkpoint: str


@functools.cache
def plan(settings: Settings, device: torch.device) -> Plan:
    """What the settings come to on this device: "auto" is on for GPUs with bfloat16, and Triton where needed."""
    gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    chosen = Plan(
        attention=_attention_on(device, settings.attention, gpu),
        fused=gpu and pointwise.has_triton() if settings.fused == "auto" else settings.fused == "1",
        trim=gpu if settings.trim == "auto" else settings.trim == "1",
        prune=settings.prune,
        compile=gpu and pointwise.has_triton() if settings.compile == "auto" else settings.compile == "1",
        overlap=gpu and settings.overlap == "auto",
        checkpoint=settings.checkpoint,
    )
    logger.info("Training forward on %s: %s", device, chosen)
    return chosen


def _attention_on(device: torch.device, asked: str, gpu: bool) -> str:
    fits = shared_attention.fits(device)
    if asked == "auto":
        return "triton" if fits else "sdpa" if gpu else "eager"
    # On a CPU plain torch stands in for the kernels.
    return "sdpa" if asked == "triton" and device.type == "cuda" and not fits else asked


def forward(
    towers: Any,
    embeds: Sequence[Tensor],
    mask: Tensor,
    position_ids: Tensor,
    conds: Sequence[Tensor | None],
    chosen: Plan,
    *,
    prefix: Prefix | None = None,
) -> list[Tensor | None]:
    """The two outputs; that of the prefix is None in training where the plan prunes it.

    Args:
        towers: holds `paligemma` and `gemma_expert`.
        embeds: prefix and suffix, (batch, length, width) each.
        mask: (batch, 1, tokens, tokens), added to the scores.
        position_ids: (batch, tokens).
        conds: condition of each tower's norms, (batch, width), or None.
        chosen: see `Plan`.
        prefix: what is known of it, beside the mask.
    """
    models = (towers.paligemma.model.language_model, towers.gemma_expert.model)
    rotary = models[0].rotary_emb(embeds[0], position_ids)
    attention = _attention(models[0].layers[0].self_attn, embeds, mask, rotary, chosen, prefix)
    pairs = list(zip(*(model.layers for model in models), strict=True))
    prune = chosen.prune and towers.training
    recomputed = _recomputed(models, embeds, chosen) if torch.is_grad_enabled() else 0
    stream = streams.second(embeds[0].device) if chosen.overlap and streams.alone() else None
    hidden: list[Tensor | None] = list(embeds)
    for index, pair in enumerate(pairs):
        # The first layers are the ones to recompute: by then the backward pass has freed what the others kept.
        keep, last = index >= recomputed, index == len(pairs) - 1
        # What is computed again is so on the stream that first asks for it.
        own = stream if keep else None
        layer = _Layer(pair, conds, attention, fused=chosen.fused, prune=prune and last, stream=own)
        hidden = pair[0].run_pair(layer, hidden, keep=keep)
    return [None if x is None else model.norm(x, cond)[0] for model, x, cond in zip(models, hidden, conds, strict=True)]


class _Layer:
    """One layer of each tower."""

    def __init__(
        self,
        pair: Sequence[Any],
        conds: Sequence[Tensor | None],
        attention: Eager | Fused | Shared,
        *,
        fused: bool,
        prune: bool,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self.pair, self.conds, self.attention = pair, conds, attention
        self.fused, self.prune, self.stream = fused, prune, stream

    def __call__(self, hidden: Sequence[Any], *, keep: bool) -> list[Tensor | None]:
        middle = self._attend(*hidden) if keep else _again(self._attend, *hidden)
        return self._both(functools.partial(self._feed_forward, keep=keep), self.pair, middle, self.conds)

    def _both(self, function: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
        """`function` of each tower's arguments."""
        first, other = zip(*columns, strict=True)
        return list(streams.side_by_side(function, first, other, self.stream))

    def _attend(self, *hidden: Tensor) -> list[Tensor | None]:
        packed, hidden, gates = zip(*self._both(self._project, self.pair, hidden, self.conds), strict=True)
        attended = self.attention([layer.self_attn for layer in self.pair], packed, prune=self.prune)
        return self._both(self._attended, self.pair, hidden, attended, gates)

    def _attended(self, layer: Any, x: Tensor, part: Tensor | None, gate: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        o_proj = layer.self_attn.o_proj
        if gate is None and self._fusable(part, (o_proj,)):
            return kernels.project(part, (o_proj,), x)
        return gated_residual(x, self._linears(part, (o_proj,)), gate)

    def _project(self, layer: Any, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries, keys and values side by side, (batch, length, (heads + 2 * kv_heads) * head_dim); x; the gate."""
        attention = layer.self_attn
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        normed, gate, norm = self._norm(layer.input_layernorm, x, cond, linears)
        if norm is not None:
            return *kernels.project_normed(x, linears, norm), None
        return self._linears(normed, linears), x, gate

    def _feed_forward(self, layer: Any, x: Tensor | None, cond: Tensor | None, keep: bool) -> Tensor | None:
        if x is None:
            return None
        mlp = layer.mlp
        linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        if self._fusable(x, linears):
            normed, gate, norm = self._norm(layer.post_attention_layernorm, x, cond, linears)
            output = kernels.feed_forward(normed, mlp, norm, keep=keep)
            return output if norm is not None else gated_residual(x, output, gate)

        def plain(x: Tensor, cond: Tensor | None) -> Any:
            normed, gate = layer.post_attention_layernorm(x, cond)
            return gated_residual(x, mlp(normed), gate)

        return plain(x, cond) if keep else _again(plain, x, cond)

    def _norm(
        self, module: Any, x: Tensor, cond: Tensor | None, linears: Sequence[Any]
    ) -> tuple[Tensor, Tensor | None, kernels.Norm | None]:
        """The normalised input and its gate; or the input as it is, and the norm that the Linears are to apply."""
        if cond is None and not module.weight.requires_grad and self._fusable(x, linears):
            return x, None, kernels.Norm(module.weight, module.eps)
        return *module(x, cond), None

    def _linears(self, x: Tensor, linears: Sequence[Any]) -> Tensor:
        if self._fusable(x, linears):
            return kernels.project(x, linears)
        outputs = [linear(x) for linear in linears]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _fusable(self, x: Tensor, linears: Sequence[Any]) -> bool:
        # The kernels' sums over rows are made for bfloat16; on the CPU plain torch stands in for them.
        fits = x.dtype == torch.bfloat16 or not x.is_cuda
        return self.fused and fits and all(kernels.fusable(y) and stored_weight(y).dtype == x.dtype for y in linears)


def _attention(
    first: Any,
    embeds: Sequence[Tensor],
    mask: Tensor,
    rotary: tuple[Tensor, Tensor],
    chosen: Plan,
    prefix: Prefix | None,
) -> Eager | Fused | Shared:
    if chosen.attention == "eager":
        return Eager(mask, rotary)
    dtype, heads = embeds[0].dtype, first.num_key_value_groups
    own = chosen.attention == "triton" and (dtype == torch.bfloat16 or not mask.is_cuda)
    if prefix is None or first.k_proj.out_features != first.head_dim or not (own or prefix.whole):
        return Fused(mask, rotary, dtype)
    return Shared(mask, rotary, dtype, heads, prefix, own=own)


def _again(function: Callable[..., Any], *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=False)


def _recomputed(models: Sequence[Any], embeds: Sequence[Tensor], chosen: Plan) -> int:
    """How many layers, from the first on, are computed again in the backward pass."""
    layers, device = len(models[0].layers), embeds[0].device
    if chosen.checkpoint != "auto":
        return {"none": 0, "layer": layers}[chosen.checkpoint]
    if device.type != "cuda":
        return layers
    kept, least, spare = layer_bytes(models, embeds, chosen)
    room = 0.9 * _free(device) - spare - _gradient_bytes(models) - layers * least
    return max(0, layers - max(0, int(room // (kept - least))))


def layer_bytes(models: Sequence[Any], embeds: Sequence[Tensor], chosen: Plan) -> tuple[int, int, int]:
    """What one layer of both towers keeps for the backward pass, at least and if nothing of it is computed again; and
    what it needs for a moment."""
    kept, least, spare = 0, 0, 0
    for model, x in zip(models, embeds, strict=True):
        elements = x.numel() // x.shape[-1] * x.element_size()
        attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
        wide = 2 * mlp.gate_proj.out_features
        projected = attention.q_proj.out_features * 2 + attention.k_proj.out_features * 2
        inside = elements * _times(mlp.gate_proj, chosen)
        least += elements * 2 * x.shape[-1]
        kept += inside * (wide + projected + 2 * x.shape[-1])
        spare += inside * 2 * wide
    if chosen.attention == "eager":
        tokens, heads = sum(x.shape[1] for x in embeds), models[0].config.num_attention_heads
        kept += embeds[0].shape[0] * heads * tokens**2 * (2 * embeds[0].element_size() + 4)  # Scores, weights, float32.
    return kept, least, spare


def _gradient_bytes(models: Sequence[Any]) -> int:
    """What the gradients of towers that train whole are still to take; those of adapters are small."""
    whole = [model for model in models if stored_weight(model.layers[0].mlp.gate_proj).requires_grad]
    return sum(p.nbytes for model in whole for p in model.parameters() if p.requires_grad and p.grad is None)


def _times(linear: Any, chosen: Plan) -> int:
    """How often a layer of such Linears keeps what one of the fused functions keeps."""
    if isinstance(linear, DoRALinear):
        return 4
    return 1 if chosen.fused and kernels.fusable(linear) else 2


def _free(device: torch.device) -> int:
    """Bytes of the GPU, and of this process's share of it, that are not in use."""
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)  # Not in every torch.
    return int(min(free, share * total - held)) + held - torch.cuda.memory_allocated(device)
