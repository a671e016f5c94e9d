"""A pi0 or pi0.5 of PyTorch as a checkpoint that openpi's JAX code reads: the inverse of `jax.py`.

JAX has one rank for the attention adapters of a tower and one for those of its MLPs. An adapter of q_proj becomes
JAX's eight either way: as it is where it is block-diagonal, of 8 times the rank; else its A is that of every head. For
o_proj, whose Bs JAX adds up, the first head holds B and the others zeros. A scaling that JAX does not have goes into B.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, LoRAError
from ..lora.jax import diagonal_blocks, first_of
from . import adapters, files, orbax, peft
from .jax_layout import (
    EMBEDDING,
    EXPERT_HEAD,
    PROJECTOR,
    TOWERS,
    VISION,
    base_tensors,
    lora_names,
    scaling,
    split,
)

_TIED = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"

Shapes = dict[str, tuple[int, ...]]
Variants = tuple[tuple[float, float] | None, bool]  # alpha of both towers or None for the rank; rslora


def export(
    checkpoint: files.Path,
    out: files.Path,
    *,
    base: files.Path | None = None,
    alpha: tuple[float, float] | None = None,
    rslora: bool = False,
    check_base: bool = True,
    vision_heads: int = 16,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Write `out/params`, whole or not at all, with one layer of one tensor in memory at a time.

    Args:
        checkpoint: an adapter folder or a training checkpoint with adapters only, which need `base`; or a whole one,
            with adapters or without.
        out: a folder that is not there yet.
        base: the plain checkpoint that the adapters were trained on.
        alpha: of the attention adapters of the openpi variants that will read it, PaliGemma's and the expert's (and
            that trained a whole checkpoint, which does not say); by default the rank, as openpi's variants have.
        rslora: whether these divide alpha by sqrt(rank).
        check_base: refuse a base other than the one that the adapters were trained on, where they name it.
        vision_heads: attention heads of SigLIP, which its weights do not tell; openpi's has 16.
        progress: wraps the names that are being worked through.

    Raises:
        CheckpointError: files that cannot be read or do not fit, another base, adapters that JAX cannot express, `out`
            is there, no space.
    """
    with _opened(checkpoint, base, check_base, (alpha, rslora)) as source:
        try:
            shapes = _jax_shapes(source.shapes, vision_heads)
        except (ValueError, ZeroDivisionError):  # Of a shape with another number of dimensions, or an empty one.
            raise _unfit("tensors of other shapes", "a whole pi0 or pi0.5") from None
        specs = _base_specs(source, shapes)
        stacks = _adapter_stacks(source, shapes, (alpha, rslora))
        specs |= {name: (stack.dtype, tuple(stack.shape)) for name, stack in stacks.items()}
        with files.creating(pathlib.Path(out)) as temporary:
            (temporary / "params").mkdir()
            orbax.write(temporary / "params", specs, _pieces(source, specs, stacks, progress(specs)))
            if (assets := pathlib.Path(checkpoint) / "assets").is_dir():
                shutil.copytree(assets, temporary / "assets")  # The normalisation that serving needs.


class _Source:
    """A checkpoint's tensors by their names in a model without adapters, and the adapters.

    Attributes:
        shapes: of each tensor but the adapters'.
        adapters: A (rank, in), B (out, rank) and scaling, by the Linear's name.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._replaced: dict[str, Tensor] = {}
        self._stored = {_plain(name): name for name in file.keys() if ".lora_" not in name}  # noqa: SIM118
        self._stored.pop(EXPERT_HEAD, None)
        self.adapters: dict[str, tuple[Tensor, Tensor, float]] = {}

    @property
    def shapes(self) -> Shapes:
        return {name: tuple(self._file.get_slice(stored).get_shape()) for name, stored in self._stored.items()}

    def dtype(self, name: str) -> torch.dtype:
        if name in self._replaced:
            return self._replaced[name].dtype
        return files.TORCH_DTYPES[self._file.get_slice(self._stored[name]).get_dtype()]

    def read(self, name: str) -> Tensor:
        return self._replaced[name] if name in self._replaced else self._file.get_tensor(self._stored[name])

    def put(self, adapter: adapters.Adapter, check_base: bool) -> None:
        """Have the values of an adapter checkpoint in place of the base's.

        Raises:
            CheckpointError: it does not fit, or was trained on another base.
        """
        _require_no_dora(adapter.tensors)
        configs, trained_on, shapes = adapter.lora, adapter.metadata.get("base"), self.shapes
        adapters.require_finite(adapter.tensors)
        self.adapters = {name: (*adapter.matrices(name), config.scaling) for name, config in configs.items()}
        wanted: Shapes = {f"{name}.weight": (B.shape[0], A.shape[1]) for name, (A, B, _) in self.adapters.items()}
        self._replaced = {
            _plain(name.removeprefix(peft.PREFIX)): tensor
            for name, tensor in adapter.tensors.items()
            if ".lora_" not in name and not name.endswith(EXPERT_HEAD)
        }
        wanted |= {name: tuple(tensor.shape) for name, tensor in self._replaced.items()}
        if odd := [f"{name} {shape}" for name, shape in wanted.items() if shapes.get(name) != shape]:
            raise _unfit("; ".join(odd[:5]), "tensors of the base's names and shapes")
        weights = ((name, self.read(f"{name}.weight")) for name in configs)
        if check_base and trained_on is not None and (found := adapters.fingerprint(weights)) != trained_on:
            raise CheckpointError(
                "The adapter was trained on another base; nothing was written.", found=found, expected=trained_on
            )

    def take(self, names: Iterable[str], variants: Variants) -> None:
        """Take the adapters that lie in the file itself, `names` of it; their scaling is that of openpi's variants."""
        tensors = {name: self._file.get_tensor(name) for name in names}
        _require_no_dora(tensors)
        # PEFT's parametrisation scales the FFN as it does attention.
        ffn = "mlp/" if any(name.endswith(".lora_B_heads") for name in tensors) else ""
        for linear in sorted(name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")):
            A, B, rank = tensors[f"{linear}.lora_A"], tensors.get(f"{linear}.lora_B"), len(tensors[f"{linear}.lora_A"])
            if B is None:
                heads = tensors[f"{linear}.lora_B_heads"]
                B = torch.block_diag(*heads) if linear.endswith("q_proj") else heads.sum(0)
                rank = heads.shape[2]
            kind = ffn if ".mlp." in linear else ""
            suffix = "" if linear.startswith(TOWERS[""]) else "_1"
            self.adapters[linear] = A, B, scaling(kind, suffix, rank, *variants)
        adapters.require_finite(tensors)


@contextlib.contextmanager
def _opened(checkpoint: files.Path, base: files.Path | None, check_base: bool, variants: Variants) -> Iterator[_Source]:
    folder = pathlib.Path(checkpoint)
    if base is None and (folder / adapters.WEIGHTS).exists():
        raise _alone(checkpoint)
    with files.reading(files.weights_file(base or checkpoint)) as file:
        names = set(file.keys())
        if adapters.METADATA in names:
            raise _alone(checkpoint)
        source = _Source(file)
        source.take({name for name in names if ".lora_" in name}, variants)
        if base is not None:
            source.put(adapters.read_adapter(checkpoint).without_prefix("model."), check_base)
        yield source


def _jax_shapes(own: Shapes, vision_heads: int) -> Shapes:
    """The shapes of JAX's tensors, of those of PyTorch's."""

    def of(name: str) -> tuple[int, ...]:
        if name not in own:
            raise _unfit(f"no {name}", "a whole pi0 or pi0.5")
        return own[name]

    def norm(jax: str, module: str) -> Shapes:
        if f"{module}.dense.weight" not in own:
            return {f"{jax}/scale": of(f"{module}.weight")}
        return _dense(f"{jax}/Dense_0", of(f"{module}.dense.weight"))

    shapes = {"PaliGemma/llm/embedder/input_embedding": of(EMBEDDING)}
    for suffix, tower in TOWERS.items():
        first = f"{tower}.layers.0"
        rows, width = of(f"{first}.self_attn.q_proj.weight")
        head_dim, hidden = of(f"{first}.self_attn.k_proj.weight")[0], of(f"{first}.mlp.gate_proj.weight")[0]
        heads = rows // head_dim
        layer = {
            f"attn/q_einsum{suffix}/w": (heads, width, head_dim),
            f"attn/kv_einsum{suffix}/w": (2, 1, width, head_dim),
            f"attn/attn_vec_einsum{suffix}/w": (heads, head_dim, width),
            f"mlp{suffix}/gating_einsum": (2, width, hidden),
            f"mlp{suffix}/linear": (hidden, width),
            **norm(f"pre_attention_norm{suffix}", f"{first}.input_layernorm"),
            **norm(f"pre_ffw_norm{suffix}", f"{first}.post_attention_layernorm"),
        }
        depth = _depth(own, f"{tower}.layers")
        shapes |= {f"PaliGemma/llm/layers/{name}": (depth, *shape) for name, shape in layer.items()}
        shapes |= norm(f"PaliGemma/llm/final_norm{suffix}", f"{tower}.norm")
    shapes |= _vision_shapes(own, of, vision_heads)
    shapes |= _dense("PaliGemma/img/head", of(f"{PROJECTOR}.linear.weight"))
    for name in own:
        if head := re.fullmatch(r"((?:action|state|time)_\w+)\.weight", name):
            shapes |= _dense(head[1], own[name])
    return shapes


def _vision_shapes(own: Shapes, of: Callable[[str], tuple[int, ...]], heads: int) -> Shapes:
    model = f"{VISION}.vision_model"
    width, channels, *patch = of(f"{model}.embeddings.patch_embedding.weight")
    hidden = of(f"{model}.encoder.layers.0.mlp.fc1.weight")[0]
    size = (heads, width // heads)
    attention = "MultiHeadDotProductAttention_0"
    block = {
        **{f"LayerNorm_{i}/{part}": (width,) for i in (0, 1) for part in ("scale", "bias")},
        **_dense("MlpBlock_0/Dense_0", (hidden, width)),
        **_dense("MlpBlock_0/Dense_1", (width, hidden)),
        **{f"{attention}/{name}/kernel": (width, *size) for name in ("query", "key", "value")},
        **{f"{attention}/{name}/bias": size for name in ("query", "key", "value")},
        f"{attention}/out/kernel": (*size, width),
        f"{attention}/out/bias": (width,),
    }
    depth = _depth(own, f"{model}.encoder.layers")
    return {
        "PaliGemma/img/embedding/kernel": (*patch, channels, width),
        "PaliGemma/img/embedding/bias": (width,),
        "PaliGemma/img/pos_embedding": (1, *of(f"{model}.embeddings.position_embedding.weight")),
        **{f"PaliGemma/img/Transformer/encoder_norm/{part}": (width,) for part in ("scale", "bias")},
        **{f"PaliGemma/img/Transformer/encoderblock/{name}": (depth, *shape) for name, shape in block.items()},
    }


def _dense(name: str, weight: tuple[int, ...]) -> Shapes:
    return {f"{name}/kernel": weight[::-1], f"{name}/bias": weight[:1]}


def _depth(own: Shapes, layers: str) -> int:
    return len({name.removeprefix(f"{layers}.").partition(".")[0] for name in own if name.startswith(f"{layers}.")})


def _base_specs(source: _Source, shapes: Shapes) -> dict[str, files.Spec]:
    """Dtype and shape of each JAX tensor, once it is certain that PyTorch's are all there and all of use."""
    own, used = source.shapes, set[str]()
    specs: dict[str, files.Spec] = {}
    wrong: list[str] = []
    for name, shape in shapes.items():
        parts = {part: tuple(view.shape) for part, view in base_tensors(name, torch.empty(shape, device="meta"))}
        used |= parts.keys()
        wrong += [f"{part} {own.get(part, 'missing')}" for part, size in parts.items() if own.get(part) != size]
        dtypes = [source.dtype(part) for part in parts if part in own]
        specs[name] = (functools.reduce(torch.promote_types, dtypes, dtypes[0] if dtypes else torch.float32), shape)
    wrong += [f"{part}, which JAX does not have" for part in sorted(own.keys() - used)]
    if wrong:
        raise _unfit("; ".join(wrong[:5]), "the tensors of a pi0 or pi0.5 of openpi")
    return specs


def _adapter_stacks(source: _Source, shapes: Shapes, variants: Variants) -> dict[str, Tensor]:
    """JAX's adapters, float32, the layers in front."""
    stacks: dict[str, Tensor] = {}
    left = set(source.adapters)
    for suffix in TOWERS:
        for group in ("attn", "mlp"):
            bases = {n: s for n, s in shapes.items() if _adapted(n) and split(n)[1] == suffix and f"/{group}" in n}
            linears = {name: _linears(name, shape) for name, shape in bases.items()}
            all_of_them = {linear for layers in linears.values() for layer in layers for linear in layer}
            if absent := all_of_them - source.adapters.keys():
                if absent != all_of_them:
                    raise _inexpressible(f"none on {sorted(absent)[0]}", f"adapters on each {group} Linear of a tower")
                continue
            left -= all_of_them
            rank = min(len(source.adapters[linear][0]) for linear in all_of_them)
            for name, layers in linears.items():
                pairs = [_to_jax(source, name, layer, shapes[name], rank, variants) for layer in layers]
                stacks |= dict(zip(lora_names(name), map(torch.stack, zip(*pairs, strict=True)), strict=True))
    if left:
        raise _inexpressible(f"adapters on {sorted(left)[0]}", "adapters on the Linears of the two Gemma towers")
    return stacks


def _adapted(name: str) -> bool:
    return name.startswith("PaliGemma/llm/layers/") and "norm" not in name


def _linears(name: str, shape: tuple[int, ...]) -> list[list[str]]:
    """By layer, the Linears that the JAX tensor `name` holds."""
    names = [part.removesuffix(".weight") for part, _ in base_tensors(name, torch.empty(shape, device="meta"))]
    each = len(names) // shape[0]
    return [names[i : i + each] for i in range(0, len(names), each)]


def _to_jax(
    source: _Source, name: str, linears: Sequence[str], shape: tuple[int, ...], rank: int, variants: Variants
) -> tuple[Tensor, Tensor]:
    """a and b of one layer of the JAX tensor `name`; the inverse of `as_linears`."""
    kind, suffix = split(name)
    pairs = []
    for linear in linears:
        A, B, own = source.adapters[linear]
        factor = own / scaling(kind, suffix, rank, *variants)
        A, B = A.float(), B.float() if factor == 1 else B.float() * factor
        if kind == "attn/q_einsum/w":
            return _to_heads(linear, A, B, shape[1], rank)
        if len(A) != rank:
            raise _inexpressible(f"rank {len(A)} on {linear}, {rank} on others", "one rank for the Linears of a tower")
        if kind == "attn/attn_vec_einsum/w":
            return A.T.reshape(shape[1], -1, rank), first_of(B.T, shape[1])
        pairs.append((A.T, B.T))
    a, b = (torch.stack(matrices) for matrices in zip(*pairs, strict=True))
    if kind == "attn/kv_einsum/w":
        return a[:, None], b[:, None]
    return (a, b) if kind == "mlp/gating_einsum" else (a[0], b[0])


def _to_heads(linear: str, A: Tensor, B: Tensor, heads: int, rank: int) -> tuple[Tensor, Tensor]:
    if len(A) == rank:
        return A.T.expand(heads, -1, -1), B.unflatten(0, (heads, -1)).transpose(1, 2)
    try:
        if len(A) != heads * rank:
            raise LoRAError("", found=f"rank {len(A)}", expected=f"{rank} or {heads * rank}")
        return A.unflatten(0, (heads, rank)).transpose(1, 2), diagonal_blocks(B, heads).transpose(1, 2)
    except LoRAError as error:
        raise _inexpressible(
            f"{linear}: {error}", f"rank {rank}, or a block-diagonal B of rank {heads * rank}"
        ) from None


def _pieces(
    source: _Source, specs: dict[str, files.Spec], stacks: dict[str, Tensor], names: Iterable[str]
) -> Iterator[tuple[str, int | None, Tensor]]:
    for name in names:
        dtype, shape = specs[name]
        if name in stacks:
            yield name, None, stacks[name]
        elif "/layers/" in name or "/encoderblock/" in name:
            for layer in range(shape[0]):
                yield name, layer, _filled(source, name, (1, *shape[1:]), dtype, layer)[0]
        else:
            yield name, None, _filled(source, name, shape, dtype)


def _filled(source: _Source, name: str, shape: tuple[int, ...], dtype: torch.dtype, first: int = 0) -> Tensor:
    """A JAX tensor, filled through the views of it that PyTorch's tensors are."""
    if split(name)[0] == "attn/q_einsum/w":  # In memory as PyTorch has it, else they would not be views.
        room = torch.empty(*shape[:-2], shape[-1], shape[-2], dtype=dtype).transpose(-1, -2)
    else:
        room = torch.empty(shape, dtype=dtype)
    for part, view in base_tensors(name, room, first):
        view.copy_(source.read(part))
    return room


def _plain(name: str) -> str:
    return EMBEDDING if name == _TIED else name.replace(".base_layer.", ".")


def _alone(checkpoint: files.Path) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} holds adapters without their base.", fix="give the base that they were trained on, as --base"
    )


def _require_no_dora(names: Iterable[str]) -> None:
    if dora := [name for name in names if name.endswith(peft.MAGNITUDE)]:
        raise _inexpressible(f"DoRA, {min(dora)}", "LoRA; or merge it, and convert what that writes")


def _unfit(found: str, expected: str) -> CheckpointError:
    return CheckpointError("The checkpoint cannot be written for JAX.", found=found, expected=expected)


def _inexpressible(found: str, expected: str) -> CheckpointError:
    return CheckpointError("JAX cannot express these adapters.", found=found, expected=expected)
