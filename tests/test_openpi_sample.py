"""`torch.compile` of openpi's `sample_actions`: one graph, and the same bits. Skipped where openpi is missing."""

import contextlib
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

if importlib.util.find_spec("openpi") is None:
    pytest.skip("openpi cannot be imported here", allow_module_level=True)
training = pytest.importorskip("openpi.training.config", reason="openpi's dependencies are missing")

from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

from openpi_lora_patch.checkpoint.adapters import save_adapter
from openpi_lora_patch.checkpoint.switch import Switcher
from openpi_lora_patch.lora import lora_layers
from openpi_lora_patch.verify import _fake_observation


def built(pi05):
    config = replace(training.get_config("debug_lora_pytorch").model, pi05=pi05)
    torch.manual_seed(0)
    model = PI0Pytorch(config).eval()
    shake(model)
    return model


def shake(model):
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)


def asked(model, seed, *, size=224, batch=2):
    """An observation and noise, with other values, prompts and masks for each seed."""
    config = model.config
    torch.manual_seed(seed)
    observation = type(config.fake_obs(1)).from_dict(_fake_observation(config))
    length = observation.tokenized_prompt.shape[1]
    images = {key: torch.rand(batch, 3, size, size) * 2 - 1 for key in observation.images}
    observation = replace(
        observation,
        images=images,
        image_masks={key: torch.rand(batch) > 0.3 for key in images},
        state=torch.randn(batch, config.action_dim),
        tokenized_prompt=torch.randint(0, 1000, (batch, length)),
        tokenized_prompt_mask=torch.arange(length) < torch.randint(1, length, (batch, 1)),
    )
    return observation, torch.randn(batch, config.action_horizon, config.action_dim)


def openpis(model):
    """openpi's own function, which ours wraps."""
    return type(model).sample_actions.__wrapped__.__get__(model)


@pytest.mark.parametrize("pi05", [False, True])
def test_the_bits_are_those_of_openpis_loop(pi05):
    model = built(pi05)
    for steps in (1, 3, 10) if pi05 else (2, 7):
        observation, noise = asked(model, steps)
        assert torch.equal(
            model.sample_actions("cpu", observation, noise, steps), openpis(model)("cpu", observation, noise, steps)
        )


def test_openpis_loop_makes_as_many_steps_as_asked_for():
    for steps in range(1, 1001, 9):
        step, time, made = np.float32(-1.0 / steps), np.float32(1.0), 0
        while time >= -step / 2:
            time, made = time + step, made + 1
        assert made == steps


def assert_one_graph(model, adapters, **sizes):
    """Asked once with each of `adapters` in force, compiled code traces once and gives openpi's own bits."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model.sample_actions, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, adapter in enumerate(adapters):
            observation, noise = asked(model, seed, **sizes)
            with adapter:
                found = compiled("cpu", observation, noise, 2)
                assert torch.equal(found, openpis(model)("cpu", observation, noise, 2))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_one_graph_serves_every_adapter(tmp_path):
    model = built(True)
    save_adapter(model, tmp_path / "other")
    shake(model)
    switcher = Switcher(model, {"other": tmp_path / "other"})
    assert_one_graph(model, [switcher.using(None), switcher.using("other")])


def test_one_graph_with_merged_adapters_and_other_image_sizes():
    model = built(False)
    for layer in lora_layers(model).values():
        layer.merge()
    assert_one_graph(model, [contextlib.nullcontext()] * 2, size=96)


@pytest.mark.parametrize(("setting", "ours"), [("auto", True), ("1", True), ("0", False)])
def test_a_setting_leaves_openpis_function_alone(child, setting, ours):
    code = """
import openpi_lora_patch
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
before = PI0Pytorch.sample_actions
openpi_lora_patch.deactivate()
print(PI0Pytorch.sample_actions is not before)
"""
    result = child("-c", code, OPENPI_LORA_COMPILE=setting)
    assert result.stdout == f"{ours}\n", result.stderr
