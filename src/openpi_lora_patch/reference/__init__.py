"""What openpi's own code computed (see README.md here), and how far another computation is from it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..pi0 import PI0, Observation, PI0Config, Tower

FOLDER = pathlib.Path(__file__).parent
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


class Reference:
    """One file of reference data.

    Attributes:
        config: sizes of the model, as the file's metadata gives them.
        state, inputs, outputs, grads: tensors by name; `grads` may be empty.
    """

    def __init__(self, path: pathlib.Path) -> None:
        with safe_open(path, "pt") as file:
            self.config: dict[str, Any] = json.loads(file.metadata()["config"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        self.state, self.inputs, self.outputs, self.grads = (
            {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
            for kind in ("state/", "in/", "out/", "grad/")
        )

    def pi0(self) -> PI0:
        """The model of a `pi0_*` or `pi05_*` file, with its weights."""
        config, vision = self.config, dict(self.config["paligemma"]["vision"])
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        model = PI0(
            PI0Config(
                **{name: config[name] for name in ("pi05", "dtype", "action_dim", "action_horizon")},
                vocab_size=config["expert"]["vocab_size"],
                paligemma=_tower(config["paligemma"]["text"]),
                expert=_tower(config["expert"]),
                vision={name: vision[name] for name in sizes},
            )
        )
        model.load_state_dict(self.state)
        return model

    def observation(self) -> Observation:
        """The input of a `pi0_*` or `pi05_*` file; the images are drawn again from their seed."""
        generator = torch.Generator().manual_seed(int(self.inputs["image_seed"]))
        return Observation(
            images=[torch.rand(2, 3, 224, 224, generator=generator) * 2 - 1 for _ in CAMERAS],
            image_masks=[self.inputs[f"image_mask/{camera}"] for camera in CAMERAS],
            tokens=self.inputs["tokenized_prompt"],
            token_mask=self.inputs["tokenized_prompt_mask"],
            state=self.inputs["state"],
        )

    def loss(self, model: PI0) -> Tensor:
        """The loss of the file's actions, noise and time, one value an element."""
        return model(self.observation(), *(self.inputs[name] for name in ("actions", "noise", "time")))


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value where that is above 1."""
    scale = max(1.0, expected.double().abs().max().item())
    return (found.double() - expected.double()).abs().max().item() / scale


def _tower(config: dict[str, int]) -> Tower:
    return Tower(
        width=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
    )
