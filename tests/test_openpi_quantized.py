"""openpi's own model on a quantised base: trained, saved whole, and loaded as a plain one. Skipped without openpi."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_model, save_file, save_model

if importlib.util.find_spec("openpi") is None:
    pytest.skip("openpi cannot be imported here", allow_module_level=True)
training = pytest.importorskip("openpi.training.config", reason="openpi's dependencies are missing")

from openpi.models.model import Observation
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

import openpi_lora_patch
from openpi_lora_patch.checkpoint.adapters import save_adapter
from openpi_lora_patch.checkpoint.merge import merge
from openpi_lora_patch.errors import LoRAError
from openpi_lora_patch.lora import lora_layers, quantized
from openpi_lora_patch.lora.quantized import QuantizedLinear
from openpi_lora_patch.verify import _fake_observation
from test_quantized import FORMATS


@pytest.fixture
def build():
    """Builds openpi's small model under a setting of `base`."""
    config = training.get_config("debug_lora_pytorch").model

    def built(base):
        openpi_lora_patch.deactivate()
        openpi_lora_patch.activate(base=base)
        torch.manual_seed(0)
        return PI0Pytorch(config)

    yield built
    openpi_lora_patch.deactivate()
    openpi_lora_patch.activate()


@pytest.mark.parametrize("name", FORMATS)
def test_it_trains_and_what_it_saves_is_a_plain_checkpoint_with_the_same_actions(build, name, tmp_path):
    model = build(name).train()
    assert all(isinstance(layer.base_layer, QuantizedLinear) for layer in lora_layers(model).values())
    observation = Observation.from_dict(_fake_observation(model.config))
    size = len(observation.state)
    actions = torch.randn(size, model.config.action_horizon, model.config.action_dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # All of them, as openpi's script gives it.
    losses = []
    for _ in range(3):
        torch.manual_seed(1)
        loss = model(observation, actions).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.requires_grad for parameter in optimizer.state)
    save_model(model, tmp_path / "model.safetensors")
    wanted = model.eval().sample_actions("cpu", observation, noise=actions, num_steps=2)
    for base in ("bf16", name):
        load_model(other := build(base), tmp_path / "model.safetensors")
        assert torch.equal(other.eval().sample_actions("cpu", observation, noise=actions, num_steps=2), wanted), base


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_merged_for_a_quantised_base_is_sampled_the_same_on_it(build, name, tmp_path):
    model = build("bf16")
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, tmp_path / "adapter")
    tied = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    state = {key.replace(".base_layer.", "."): tensor for key, tensor in model.state_dict().items() if key != tied}
    save_file({key: tensor for key, tensor in state.items() if ".lora_" not in key}, tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out", dtype=torch.bfloat16, quantize=name)
    observation = Observation.from_dict(_fake_observation(model.config))
    noise = torch.randn(len(observation.state), model.config.action_horizon, model.config.action_dim)
    actions = []
    for base in ("bf16", name):
        load_model(other := build(base), tmp_path / "out" / "model.safetensors")
        actions.append(other.eval().sample_actions("cpu", observation, noise=noise, num_steps=2))
    assert torch.equal(*actions)


def test_what_is_missing_is_said_before_anything_is_built(build, monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LoRAError, match="bitsandbytes"):
        build("nf4")
