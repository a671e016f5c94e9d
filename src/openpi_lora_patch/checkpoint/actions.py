"""How far a merged checkpoint's rounding moves the actions that are sampled from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import pi0
from ..errors import CheckpointError
from . import adapters, files
from .merge import Merging

_TOWERS = "paligemma_with_expert."
_PALIGEMMA, _EXPERT = f"{_TOWERS}paligemma.model.language_model", f"{_TOWERS}gemma_expert.model"
_VISION = f"{_TOWERS}paligemma.model.vision_tower.vision_model"


@dataclasses.dataclass(frozen=True)
class Effect:
    """Absolute differences of normalised actions, which are of size 1, from those of the unrounded merge.

    Attributes:
        worst, mean: of what is stored.
        adapter_worst, adapter_mean: of the base alone, which is what the adapter is worth, for comparison.
    """

    worst: float
    mean: float
    adapter_worst: float
    adapter_mean: float


@torch.no_grad()
def effect(base: files.Path, adapter: files.Path, merged: files.Path, *, device: str = "cpu", seed: int = 0) -> Effect:
    """Sample actions for one random observation with the stored, the unrounded and the base weights, in float32.

    Holds one model in float32: 16 GB at full size, with the largest tensor twice.

    Args:
        base, adapter, merged: what `merge` was given, and what it wrote.
        device: where the model is.
        seed: of the observation and the noise.

    Raises:
        CheckpointError: files that cannot be read, or no pi0 and no pi0.5.
    """
    taken = adapters.read_adapter(adapter)
    with files.reading(files.weights_file(base)) as plain, files.reading(files.weights_file(merged)) as stored:
        exact = Merging(plain, taken)
        prefix = "model." if exact.in_policy else ""
        shapes = {name.removeprefix(prefix): shape for name, _, shape in exact.specs()}
        with torch.device(device):
            model = pi0.PI0(_config(shapes, taken.metadata.get("model", {})))
        inputs = _inputs(model.config, device, seed)

        def sample(tensors: Iterable[tuple[str, Tensor]]) -> Tensor:
            _fill(model, ((name.removeprefix(prefix), tensor) for name, tensor in tensors))
            return model.sample_actions(*inputs)

        expected = sample(exact.tensors(exact.names, dict.fromkeys(exact.names, torch.float32), {}))
        rounded, before = (
            (sample((name, file.get_tensor(name)) for name in exact.names) - expected).abs() for file in (stored, plain)
        )
    return Effect(rounded.max().item(), rounded.mean().item(), before.max().item(), before.mean().item())


def _config(shapes: Mapping[str, tuple[int, ...]], saved: Mapping[str, Any]) -> pi0.PI0Config:
    """The sizes that a checkpoint's shapes give; the horizon is not among them, and comes from the adapter if known."""
    try:
        width = shapes[f"{_VISION}.embeddings.patch_embedding.weight"][0]
        return pi0.PI0Config(
            pi05="time_mlp_in.weight" in shapes,
            dtype="float32",
            action_dim=shapes["action_in_proj.weight"][1],
            action_horizon=saved.get("action_horizon", pi0.PI0Config.action_horizon),
            vocab_size=shapes[f"{_TOWERS}gemma_expert.lm_head.weight"][0],
            paligemma=_tower(shapes, _PALIGEMMA),
            expert=_tower(shapes, _EXPERT),
            vision={
                "hidden_size": width,
                "intermediate_size": shapes[f"{_VISION}.encoder.layers.0.mlp.fc1.weight"][0],
                "num_hidden_layers": _depth(shapes, f"{_VISION}.encoder"),
                # Of So400m, or of the small tower beside openpi's dummies: no shape tells it.
                "num_attention_heads": 16 if width == pi0.SO400M["hidden_size"] else 2,
            },
        )
    except KeyError as error:
        raise CheckpointError(
            "The effect on actions cannot be sampled: the base is no pi0 and no pi0.5.", found=f"no tensor {error}"
        ) from None


def _tower(shapes: Mapping[str, tuple[int, ...]], name: str) -> pi0.Tower:
    queries, width = shapes[f"{name}.layers.0.self_attn.q_proj.weight"]
    head_dim = shapes[f"{name}.layers.0.self_attn.k_proj.weight"][0]  # All variants have one key head.
    mlp_dim = shapes[f"{name}.layers.0.mlp.up_proj.weight"][0]
    return pi0.Tower(width, mlp_dim, _depth(shapes, name), queries // head_dim, 1, head_dim)


def _depth(shapes: Mapping[str, Any], name: str) -> int:
    return len({key.removeprefix(f"{name}.layers.").partition(".")[0] for key in shapes if f"{name}.layers." in key})


def _fill(model: pi0.PI0, tensors: Iterable[tuple[str, Tensor]]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = set()
    for name, tensor in tensors:
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise CheckpointError("A tensor is none of pi0 or pi0.5.", found=f"{name} {tuple(tensor.shape)}")
        parameters[name].copy_(tensor)
        filled.add(id(parameters[name]))
    if missing := [name for name, parameter in parameters.items() if id(parameter) not in filled]:
        raise CheckpointError("A checkpoint is no whole pi0 or pi0.5.", found=f"no tensor {missing[0]}")


def _inputs(config: pi0.PI0Config, device: str, seed: int) -> tuple[pi0.Observation, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    length = 200 if config.pi05 else 48  # openpi's prompts.
    observation = pi0.Observation(
        images=[(torch.rand(1, 3, 224, 224, generator=draw) * 2 - 1).to(device) for _ in range(3)],
        image_masks=[torch.ones(1, dtype=torch.bool, device=device) for _ in range(3)],
        tokens=torch.randint(config.vocab_size, (1, length), generator=draw).to(device),
        token_mask=torch.ones(1, length, dtype=torch.bool, device=device),
        state=torch.randn(1, config.action_dim, generator=draw).to(device),
    )
    return observation, torch.randn(1, config.action_horizon, config.action_dim, generator=draw).to(device)
