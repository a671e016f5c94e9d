"""What openpi's copied `modeling_gemma.py` does, as classes that a stock model is converted to once it is built.

Norms are replaced; model, layers and attentions change class to the ones below, which keep the stock names (FSDP and
accelerate match on them) and need nothing of the stock forwards, whose signatures changed in seven eras.

Source: openpi, `models_pytorch/transformers_replace/models/gemma` (transformers 4.53.2); behaviour only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma import modeling_gemma as stock

from ..patches.gemma import gated_residual


class AdaptiveNorm(nn.Module):
    """RMS norm over the last axis whose scale, shift and gate may come from a condition (AdaRMS).

    The class name must not hold "RMSNorm": transformers' `_init_weights` would look for a weight that need not exist.

    Args:
        dim: size of the normalised axis.
        eps: added to the variance.
        cond_dim: size of the condition; None makes a plain norm, with a weight of zeros (scale 1) in bfloat16.
    """

    def __init__(self, dim: int, eps: float, cond_dim: int | None) -> None:
        super().__init__()
        self.eps = eps
        self.cond_dim = cond_dim
        if cond_dim is None:
            self.weight = nn.Parameter(torch.zeros(dim, dtype=torch.bfloat16))
        else:
            self.dense = nn.Linear(cond_dim, 3 * dim)
            nn.init.zeros_(self.dense.weight)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Normalise `x` (batch, seq, dim) under `cond` (batch, cond_dim); returns it and the gate (batch, 1, dim).

        Raises:
            ValueError: an adaptive norm without a condition, a plain norm with one, or one of another size.
        """
        size = None if cond is None else cond.shape[-1]
        if size != self.cond_dim:
            raise ValueError(f"expected a condition of size {self.cond_dim}, got {size}")
        variance = x.float().square().mean(dim=-1, keepdim=True)
        normed = x * torch.rsqrt(variance + self.eps)
        if cond is None:
            return (normed * (1.0 + self.weight.float())).to(x.dtype), None
        modulation = self.dense(cond)
        if x.ndim == 3:
            modulation = modulation.unsqueeze(1)
        scale, shift, gate = modulation.chunk(3, dim=-1)
        return (normed * (1 + scale.float()) + shift.float()).to(x.dtype), gate.to(x.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, cond_dim={self.cond_dim}"


class GemmaAttention(stock.GemmaAttention):
    """Attention that, with a cache and `use_cache=False`, reads the cached keys and values and leaves them alone."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`hidden_states` (batch, queries, hidden), `attention_mask` (batch, 1, queries, keys), added to the scores."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = stock.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None and use_cache:
            key, value = past_key_values.update(key, value, self.layer_idx)
        elif past_key_values is not None:
            cached_key, cached_value = _cached(past_key_values, self.layer_idx)
            key, value = torch.cat([cached_key, key], dim=2), torch.cat([cached_value, value], dim=2)

        implementation = self.config._attn_implementation
        attend = stock.eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        # Since 5.2.0 the attention functions take the mask as it comes.
        mask = attention_mask[..., : key.shape[-2]]
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


class GemmaDecoderLayer(stock.GemmaDecoderLayer):
    """Attention and MLP, each after an adaptive norm and behind a gated residual."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        adarms_cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the layer's output (batch, seq, hidden) and its attention weights, where the kernel gives them."""
        residual = hidden_states
        hidden_states, gate = self.input_layernorm(hidden_states, adarms_cond)
        hidden_states, weights = self.self_attn(
            hidden_states, position_embeddings, attention_mask, past_key_values, use_cache
        )
        residual = gated_residual(residual, hidden_states, gate)
        hidden_states, gate = self.post_attention_layernorm(residual, adarms_cond)
        return gated_residual(residual, self.mlp(hidden_states), gate), weights

    def run_pair(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`run(*args, **kwargs)`, which runs this layer and its like of the other tower: where FSDP gathers both."""
        return run(*args, **kwargs)


class GemmaModel(stock.GemmaModel):
    """Decoder that takes `adarms_cond` and does not scale its embeddings by sqrt(hidden_size)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        convert(self)  # `type(model)(config)` makes another, whether the patches are in place or not.

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        cache_position: Tensor | None = None,
        adarms_cond: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (batch, seq) token ids; this or `inputs_embeds`.
            attention_mask: (batch, 1, seq, keys), added to the scores; or (batch, keys) with 0 for padding, or None:
                causal attention.
            position_ids: (batch, seq); counted on from the cache where absent.
            past_key_values: keys and values of earlier positions; appended to only with `use_cache`.
            inputs_embeds: (batch, seq, hidden), cast to bfloat16 where the first layer's weights are.
            adarms_cond: (batch, adarms_cond_dim), needed where the config says `use_adarms`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`; a condition missing or not expected.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16:
            hidden_states = hidden_states.to(torch.bfloat16)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()

        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + hidden_states.shape[1], device=hidden_states.device)[None]
        if attention_mask is None or attention_mask.ndim == 2:
            attention_mask = _causal_mask(attention_mask, hidden_states, seen)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)

        states, attentions = [hidden_states], []
        for layer in self.layers:
            hidden_states, weights = layer(
                hidden_states, position_embeddings, attention_mask, past_key_values, use_cache, adarms_cond
            )
            states.append(hidden_states)
            attentions.append(weights)
        hidden_states, _ = self.norm(hidden_states, adarms_cond)
        states[-1] = hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def _conditioned(head: Any) -> Any:
    """The forward of a stock class, which does not hand `adarms_cond` (batch, adarms_cond_dim) on in every release."""

    def forward(self: Any, *args: Any, adarms_cond: Tensor | None = None, **kwargs: Any) -> Any:
        handle = self.model.register_forward_pre_hook(
            lambda _, positional, named: (positional, named | {"adarms_cond": adarms_cond}), with_kwargs=True
        )
        try:
            return head.forward(self, *args, **kwargs)
        finally:
            handle.remove()

    return forward


# Each has its stock class as the only base: with a mixin an instance's class could not be assigned in 4.54.
class GemmaForCausalLM(stock.GemmaForCausalLM):
    """Next-token head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        convert_head(self)

    forward = _conditioned(stock.GemmaForCausalLM)


class GemmaForSequenceClassification(stock.GemmaForSequenceClassification):
    """Classification head on the last token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        convert_head(self)

    forward = _conditioned(stock.GemmaForSequenceClassification)


class GemmaForTokenClassification(stock.GemmaForTokenClassification):
    """Classification head on each token."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        convert_head(self)

    forward = _conditioned(stock.GemmaForTokenClassification)


def convert_head(head: Any) -> None:
    """Turn a stock model with a head, weights and all, into the one above of the same name."""
    head.__class__ = globals()[type(head).__name__]
    convert(head.model)


def convert(model: Any) -> None:
    """Turn a stock `GemmaModel`, weights and all, into the one above."""
    config = model.config
    # A condition's size defaults to the hidden size; without AdaRMS there is none, whatever its size.
    cond_dim = (getattr(config, "adarms_cond_dim", None) or config.hidden_size) if config.use_adarms else None
    norm = functools.partial(AdaptiveNorm, config.hidden_size, config.rms_norm_eps, cond_dim)
    model.__class__ = GemmaModel
    model.norm = norm()
    # Undoes the scaled embedding of 5.4.0 and later: openpi scales for itself.
    model.embed_tokens.__class__ = nn.Embedding
    for layer in model.layers:
        layer.__class__ = GemmaDecoderLayer
        layer.self_attn.__class__ = GemmaAttention
        layer.input_layernorm = norm()
        layer.post_attention_layernorm = norm()


def _cached(cache: Any, index: int) -> tuple[Tensor, Tensor]:
    if hasattr(cache, "layers"):
        return cache.layers[index].keys, cache.layers[index].values
    key, value = cache[index]
    return key, value


def _causal_mask(padding: Tensor | None, hidden_states: Tensor, seen: int) -> Tensor:
    queries = hidden_states.shape[1]
    allowed = torch.ones(queries, seen + queries, dtype=torch.bool, device=hidden_states.device).tril(seen)[None, None]
    if padding is not None:
        allowed = allowed & padding.bool()[:, None, None, :]
    blocked = torch.finfo(hidden_states.dtype).min
    return torch.zeros_like(allowed, dtype=hidden_states.dtype).masked_fill(~allowed, blocked)
