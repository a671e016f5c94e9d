"""Checkpoints of openpi's JAX code as PyTorch adapters, or merged. Needs tensorstore, and neither JAX nor openpi.

Source: openpi, `models/{gemma,lora,siglip}.py` (commit 15a9616). JAX stacks the layers in front of each tensor. Its
LoRA, `x @ a @ b * scaling` in each einsum, is LoRA on the Linears of PyTorch thus:

    q_einsum         a (heads, in, r), b (heads, r, dim)     rank heads * r: A stacked, B block-diagonal
    kv_einsum        a (2, 1, in, r), b (2, 1, r, dim)       k and v, each as q with one head
    attn_vec_einsum  a (heads, dim, r), b (heads, r, out)    B summed over heads: the einsum sums them between a and b
    gating_einsum    a (2, in, r), b (2, r, out)             gate and up; without scaling
    linear           a (in, r), b (r, out)                   down; without scaling
"""

from __future__ import annotations

import importlib
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..lora.config import LoRAConfig
from . import adapters, files, peft

Named = Iterator[tuple[str, Tensor]]

_TOWERS = {"": "paligemma_with_expert.paligemma.model.language_model", "_1": "paligemma_with_expert.gemma_expert.model"}
_VISION = "paligemma_with_expert.paligemma.model.vision_tower"
_PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector"
_EMBEDDING = "paligemma_with_expert.paligemma.lm_head.weight"
# PyTorch's expert has a head that no code path uses and JAX does not have; a strict load wants it.
_EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


class JaxCheckpoint:
    """The tensors of an Orbax checkpoint, read one at a time.

    Args:
        path: the checkpoint, or its `params` folder.

    Attributes:
        shapes: by name, "PaliGemma/llm/layers/attn/q_einsum/w".

    Raises:
        CheckpointError: no such checkpoint, or no tensorstore.
    """

    def __init__(self, path: files.Path) -> None:
        folder = pathlib.Path(path)
        self._folder = (folder / "params" if (folder / "params").is_dir() else folder).resolve()
        try:
            self._tensorstore: Any = importlib.import_module("tensorstore")
        except ImportError:
            raise CheckpointError(
                "JAX checkpoints need tensorstore.", fix="pip install 'openpi-lora-patch[jax]'"
            ) from None
        if not (self._folder / "manifest.ocdbt").exists():
            raise CheckpointError(f"{path} is no Orbax checkpoint.", expected="a folder with params/manifest.ocdbt")
        self._keys: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            store = self._tensorstore.KvStore.open(self._kvstore("")).result()
            for key in (key.decode() for key in store.list().result()):
                if key.endswith("/.zarray"):
                    self._add(key.removesuffix("/.zarray"), json.loads(store.read(key).result().value))
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be read.", found=str(error)[:500]) from None

    def read(self, name: str) -> Tensor:
        """One tensor, in its own dtype."""
        try:
            spec = {"driver": "zarr", "kvstore": self._kvstore(self._keys[name] + "/")}
            array = self._tensorstore.open(spec).result().read().result()
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be read.", found=str(error)[:500]) from None
        if array.dtype.name == "bfloat16":  # numpy has it from a package that torch does not know
            return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
        return torch.from_numpy(array)

    def _kvstore(self, path: str) -> dict[str, str]:
        return {"driver": "ocdbt", "base": f"file://{self._folder}/", "path": path}

    def _add(self, key: str, array: dict[str, Any]) -> None:
        # A checkpoint of a training state has ".value" behind each name.
        name = key.removeprefix("params.").removesuffix(".value").replace(".", "/")
        self._keys[name], self.shapes[name] = key, tuple(array["shape"])


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
        self.bases = [name for name in source.shapes if _lora_names(name)[0] in source.shapes]

    def pairs(self, base: str, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """Name of the Linear, A (rank, in), B (out, rank) and scaling, for each Linear that the tensor `base` holds."""
        if base not in self.bases:
            return
        stacks = [read(name).float() for name in _lora_names(base)]
        kind, suffix = _split(base)
        for layer, (a, b) in enumerate(zip(*stacks, strict=True)):
            for linear, (A, B) in _as_linears(kind, a, b).items():
                yield f"{_TOWERS[suffix]}.layers.{layer}.{linear}", A, B, self._scaling(kind, suffix, a.shape[-1])

    def _scaling(self, kind: str, suffix: str, rank: int) -> float:
        if kind.startswith("mlp/"):
            return 1.0
        alpha = rank if self.alpha is None else self.alpha[0 if suffix == "" else 1]
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _as_linears(kind: str, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
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


def _lora_names(base: str) -> tuple[str, str]:
    stem = base.removesuffix("w") if base.endswith("/w") else f"{base}_"
    return f"{stem}lora_a", f"{stem}lora_b"


def _split(name: str) -> tuple[str, str]:
    """ "PaliGemma/llm/layers/attn/q_einsum_1/w" to ("attn/q_einsum/w", "_1"), the tower's suffix."""
    short = re.sub(r"^PaliGemma/llm/(layers/)?", "", name)
    kind = re.sub(r"_1(?=/|$)", "", short)
    return kind, "_1" if kind != short else ""


def _base_tensors(name: str, tensor: Tensor) -> Named:
    """The PyTorch tensors that the JAX tensor `name` holds.

    Raises:
        CheckpointError: a name that openpi's models do not have.
    """
    if name == "PaliGemma/llm/embedder/input_embedding":
        yield _EMBEDDING, tensor
    elif name.startswith("PaliGemma/llm/layers/"):
        kind, suffix = _split(name)
        for layer, inner in enumerate(tensor):
            for own, value in _layer_tensors(kind, inner).items():
                yield f"{_TOWERS[suffix]}.layers.{layer}.{own}", value
    elif name.startswith("PaliGemma/llm/final_norm"):
        kind, suffix = _split(name)
        yield f"{_TOWERS[suffix]}.norm.{_norm(kind)[0]}", _norm(kind)[1](tensor)
    elif name.startswith("PaliGemma/img/head/"):
        yield from _linear(f"{_PROJECTOR}.linear", name, tensor)
    elif name.startswith("PaliGemma/img/"):
        yield from _vision_tensors(name.removeprefix("PaliGemma/img/"), tensor)
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


def _vision_tensors(name: str, tensor: Tensor) -> Named:
    model = f"{_VISION}.vision_model"
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
        for layer, inner in enumerate(tensor):
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


def _bases(source: JaxCheckpoint) -> list[str]:
    return [name for name in source.shapes if not name.endswith(("lora_a", "lora_b"))]


def _merged_tensors(source: JaxCheckpoint, lora: _Lora, names: Iterable[str], read: Callable[[str], Tensor]) -> Named:
    for name in names:
        tensor = read(name)
        deltas = {f"{linear}.weight": (A, B, scaling) for linear, A, B, scaling in lora.pairs(name, read)}
        for own, value in _base_tensors(name, tensor):
            if own in deltas:
                A, B, scaling = deltas[own]
                value = value.float() + scaling * (B @ A)
            yield own, value
        if name == "PaliGemma/llm/embedder/input_embedding":
            width = source.shapes["PaliGemma/llm/layers/attn/q_einsum_1/w"][2]
            yield _EXPERT_HEAD, tensor.new_zeros(tensor.shape[0], width)


def _trained_tensors(lora: _Lora, names: Iterable[str], read: Callable[[str], Tensor]) -> Named:
    """The adapters, and what openpi's JAX LoRA runs train besides: SigLIP, projector and heads."""
    for name in names:
        for linear, A, B, _ in lora.pairs(name, read):
            yield peft.tensor_name(linear, "lora_A"), A
            yield peft.tensor_name(linear, "lora_B"), B
        if not name.startswith("PaliGemma/llm/"):
            for own, value in _base_tensors(name, read(name)):
                yield peft.PREFIX + own, value.float()


def _write_merged(
    source: JaxCheckpoint, lora: _Lora, out: pathlib.Path, dtype: torch.dtype, progress: Callable[..., Iterable[str]]
) -> None:
    names = _bases(source)
    specs = {name: (dtype, tuple(t.shape)) for name, t in _merged_tensors(source, lora, names, _shape_only(source))}
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
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in _trained_tensors(lora, names, shape_only)}
    configs = {
        linear: LoRAConfig(rank=A.shape[0], alpha=scaling * A.shape[0])
        for base in lora.bases
        for linear, A, _, scaling in lora.pairs(base, shape_only)
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


def _adapted_weights(source: JaxCheckpoint, lora: _Lora, configs: Mapping[str, LoRAConfig]) -> Named:
    for base in lora.bases:
        for name, tensor in _base_tensors(base, source.read(base)):
            if name.removesuffix(".weight") in configs:
                yield name.removesuffix(".weight"), tensor


def _saved_modules(names: Iterable[str]) -> list[str]:
    plain = [name.removeprefix(peft.PREFIX) for name in names if ".lora_" not in name]
    heads = {name.partition(".")[0] for name in plain if not name.startswith("paligemma_with_expert.")}
    towers = {module for module in (_VISION, _PROJECTOR) for name in plain if name.startswith(f"{module}.")}
    return sorted(heads | towers)


def _shape_only(source: JaxCheckpoint) -> Callable[[str], Tensor]:
    return lambda name: torch.empty(source.shapes[name], dtype=torch.float32, device="meta")
