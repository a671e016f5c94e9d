"""How openpi's JAX code lays out pi0 and pi0.5, in terms of PyTorch's tensors.

Source: openpi, `models/{gemma,lora,siglip}.py` (commit 15a9616). JAX stacks the layers in front of each tensor. Its
LoRA, `x @ a @ b * scaling` in each einsum, is LoRA on the Linears of PyTorch thus:

    q_einsum         a (heads, in, r), b (heads, r, dim)     rank heads * r: A stacked, B block-diagonal
    kv_einsum        a (2, 1, in, r), b (2, 1, r, dim)       k and v, each as q with one head
    attn_vec_einsum  a (heads, dim, r), b (heads, r, out)    B summed over heads: the einsum sums them between a and b
    gating_einsum    a (2, in, r), b (2, r, out)             gate and up; without scaling
    linear           a (in, r), b (r, out)                   down; without scaling
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from torch import Tensor

from ..errors import CheckpointError

Named = Iterator[tuple[str, Tensor]]

TOWERS = {"": "paligemma_with_expert.paligemma.model.language_model", "_1": "paligemma_with_expert.gemma_expert.model"}
VISION = "paligemma_with_expert.paligemma.model.vision_tower"
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector"
EMBEDDING = "paligemma_with_expert.paligemma.lm_head.weight"
# PyTorch's expert has a head that no code path uses and JAX does not have; a strict load wants it.
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


def scaling(kind: str, suffix: str, rank: int, alpha: tuple[float, float] | None, rslora: bool) -> float:
    """What JAX multiplies `x @ a @ b` of the tensor `kind` by; `alpha` is PaliGemma's and the expert's, or the rank."""
    if kind.startswith("mlp/"):
        return 1.0
    own = rank if alpha is None else alpha[0 if suffix == "" else 1]
    return own / (math.sqrt(rank) if rslora else rank)


def as_linears(kind: str, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each Linear, from those of one layer; see the head of this file."""
    if kind == "attn/q_einsum/w":
        return {"self_attn.q_proj": _heads(a, b)}
    if kind == "attn/kv_einsum/w":
        return {"self_attn.k_proj": _heads(a[0], b[0]), "self_attn.v_proj": _heads(a[1], b[1])}
    if kind == "attn/attn_vec_einsum/w":
        return {"self_attn.o_proj": (a.reshape(-1, a.shape[-1]).T, b.sum(0).T)}
    if kind == "mlp/gating_einsum":
        return {"mlp.gate_proj": (a[0].T, b[0].T), "mlp.up_proj": (a[1].T, b[1].T)}
    return {"mlp.down_proj": (a.T, b.T)}


def _heads(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(heads, in, r) and (heads, r, dim) to (heads * r, in) and (heads * dim, heads * r)."""
    heads, width, rank = a.shape
    B = b.new_zeros(heads, b.shape[2], heads, rank)
    for head in range(heads):
        B[head, :, head] = b[head].T
    return a.transpose(1, 2).reshape(-1, width), B.reshape(-1, heads * rank)


def lora_names(base: str) -> tuple[str, str]:
    stem = base.removesuffix("w") if base.endswith("/w") else f"{base}_"
    return f"{stem}lora_a", f"{stem}lora_b"


def split(name: str) -> tuple[str, str]:
    """ "PaliGemma/llm/layers/attn/q_einsum_1/w" to ("attn/q_einsum/w", "_1"), the tower's suffix."""
    short = re.sub(r"^PaliGemma/llm/(layers/)?", "", name)
    kind = re.sub(r"_1(?=/|$)", "", short)
    return kind, "_1" if kind != short else ""


def base_tensors(name: str, tensor: Tensor, first: int = 0) -> Named:
    """The PyTorch tensors that the JAX tensor `name` holds; but for queries they are views of it.

    Args:
        name: of a tensor that is no adapter's.
        tensor: of JAX's shape; of one with the layers in front, some layers will do.
        first: the number of the first of these layers.

    Raises:
        CheckpointError: a name that openpi's models do not have.
    """
    if name == "PaliGemma/llm/embedder/input_embedding":
        yield EMBEDDING, tensor
    elif name.startswith("PaliGemma/llm/layers/"):
        kind, suffix = split(name)
        for layer, inner in enumerate(tensor, start=first):
            for own, value in _layer_tensors(kind, inner).items():
                yield f"{TOWERS[suffix]}.layers.{layer}.{own}", value
    elif name.startswith("PaliGemma/llm/final_norm"):
        kind, suffix = split(name)
        yield f"{TOWERS[suffix]}.norm.{_norm(kind)[0]}", _norm(kind)[1](tensor)
    elif name.startswith("PaliGemma/img/head/"):
        yield from _linear(f"{PROJECTOR}.linear", name, tensor)
    elif name.startswith("PaliGemma/img/"):
        yield from _vision_tensors(name.removeprefix("PaliGemma/img/"), tensor, first)
    elif re.fullmatch(r"(action|state|time)_\w+/(kernel|bias)", name):
        yield from _linear(name.partition("/")[0], name, tensor)
    else:
        raise _unknown(name)


def _layer_tensors(kind: str, w: Tensor) -> dict[str, Tensor]:
    if kind == "attn/q_einsum/w":
        return {"self_attn.q_proj.weight": w.transpose(1, 2).reshape(-1, w.shape[1])}
    if kind == "attn/kv_einsum/w":
        names = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
        return {name: w[i].transpose(1, 2).reshape(-1, w.shape[2]) for i, name in enumerate(names)}
    if kind == "attn/attn_vec_einsum/w":
        return {"self_attn.o_proj.weight": w.reshape(-1, w.shape[-1]).T}
    if kind == "mlp/gating_einsum":
        return {"mlp.gate_proj.weight": w[0].T, "mlp.up_proj.weight": w[1].T}
    if kind == "mlp/linear":
        return {"mlp.down_proj.weight": w.T}
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if (norm := kind.partition("/")[0]) in norms:
        return {f"{norms[norm]}.{_norm(kind)[0]}": _norm(kind)[1](w)}
    raise _unknown(kind)


def _norm(kind: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """A plain norm's scale, or the Linear that makes an adaptive norm's."""
    parts = {
        "scale": ("weight", lambda w: w),
        "Dense_0/kernel": ("dense.weight", lambda w: w.T),
        "Dense_0/bias": ("dense.bias", lambda w: w),
    }
    part = kind.partition("/")[2]
    if part not in parts:
        raise _unknown(kind)
    return parts[part]


def _vision_tensors(name: str, tensor: Tensor, first: int) -> Named:
    model = f"{VISION}.vision_model"
    if name == "embedding/kernel":
        yield f"{model}.embeddings.patch_embedding.weight", tensor.permute(3, 2, 0, 1)
    elif name == "embedding/bias":
        yield f"{model}.embeddings.patch_embedding.bias", tensor
    elif name == "pos_embedding":
        yield f"{model}.embeddings.position_embedding.weight", tensor.reshape(-1, tensor.shape[-1])
    elif name.startswith("Transformer/encoder_norm/"):
        yield f"{model}.post_layernorm.{_norm_part(name)}", tensor
    elif name.startswith("Transformer/encoderblock/"):
        kind = name.removeprefix("Transformer/encoderblock/")
        for layer, inner in enumerate(tensor, start=first):
            own, value = _vision_layer(kind, inner)
            yield f"{model}.encoder.layers.{layer}.{own}", value
    else:
        raise _unknown(name)


def _vision_layer(kind: str, w: Tensor) -> tuple[str, Tensor]:
    module, _, part = kind.rpartition("/")
    attention = "MultiHeadDotProductAttention_0/"
    names = {
        "LayerNorm_0": "layer_norm1",
        "LayerNorm_1": "layer_norm2",
        "MlpBlock_0/Dense_0": "mlp.fc1",
        "MlpBlock_0/Dense_1": "mlp.fc2",
        f"{attention}query": "self_attn.q_proj",
        f"{attention}key": "self_attn.k_proj",
        f"{attention}value": "self_attn.v_proj",
        f"{attention}out": "self_attn.out_proj",
    }
    if module not in names:
        raise _unknown(kind)
    if part != "kernel":
        return f"{names[module]}.{_norm_part(kind)}", w.reshape(-1)
    # Kernels are (in, out), in attention with heads and their size for one of the two.
    rows = w.shape[-1] if module.endswith("out") else w.shape[0]
    matrix = w.reshape(-1, rows) if module.endswith("out") else w.reshape(rows, -1)
    return f"{names[module]}.weight", matrix.T


def _norm_part(name: str) -> str:
    return "bias" if name.endswith("/bias") else "weight"


def _linear(module: str, name: str, tensor: Tensor) -> Named:
    if name.endswith("/kernel"):
        yield f"{module}.weight", tensor.T
    else:
        yield f"{module}.bias", tensor


def _unknown(name: str) -> CheckpointError:
    return CheckpointError("A JAX checkpoint holds a tensor that pi0 and pi0.5 do not have.", found=name)
