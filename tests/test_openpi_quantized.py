"""openpi's own model on a quantised base: trained, saved whole, and loaded as a plain one. Skipped without openpi."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_model, save_file, save_model

if importlib.util.find_spec("openpi") is None:
    pytest.skip("openpi cannot be imported here", allow_module_level=True)
training = pytest.importorskip("openpi.training.config", reason="openpi's dependencies are missing")

from openpi.models.model import Observation
from openpi.models_pytorch import pi0_pytorch
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

import openpi_lora_patch
from openpi_lora_patch.checkpoint.adapters import save_adapter
from openpi_lora_patch.checkpoint.merge import merge
from openpi_lora_patch.checkpoint.switch import Switcher
from openpi_lora_patch.errors import LoRAError
from openpi_lora_patch.lora import lora_layers, quantized
from openpi_lora_patch.lora.quantized import QuantizedLinear
from openpi_lora_patch.verify import _fake_observation
from test_openpi_sample import assert_one_graph, shake
from test_quantized import FORMATS


@pytest.fixture
def build():
    """Builds openpi's small model under a setting of `base`."""
    config = training.get_config("debug_lora_pytorch").model

    def built(base, *, pi05=False, **settings):
        openpi_lora_patch.deactivate()
        openpi_lora_patch.activate(base=base, **settings)
        torch.manual_seed(0)
        return PI0Pytorch(replace(config, pi05=pi05))

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


PARTS = ("embed_tokens", "input_layernorm", "vision_tower", "multi_modal_projector", "action_in_proj", "time_mlp")


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_under_an_adapter_stays_as_it_is(build, name, pi05):
    plain, held = (build(base, pi05=pi05) for base in ("bf16", name))
    bases = {f"{key}.base_layer.weight" for key in lora_layers(plain)}
    expected = {key: tensor for key, tensor in plain.named_parameters() if key not in bases}
    found = dict(held.named_parameters())
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == tensor.dtype for key, tensor in expected.items())
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert [part for part in PARTS if not any(part in key for key in found)] == []
    assert {tensor.dtype for tensor in found.values()} == {torch.float32, torch.bfloat16}
    states = [{key: tensor.dtype for key, tensor in model.state_dict().items()} for model in (plain, held)]
    assert states[0] == states[1]


@pytest.mark.parametrize("settings", [{"joint": False}, {"checkpoint": "layer"}], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_openpis_forward_gets_the_weight_and_dtype_that_it_reads(build, name, settings, tmp_path):
    """Its own, which casts by `q_proj.weight.dtype`, and ours, with checkpoints: a plain model's bits and gradients."""
    held, plain = build(name, **settings), build("bf16", **settings)
    save_model(held, tmp_path / "model.safetensors")
    load_model(plain, tmp_path / "model.safetensors")
    observation = Observation.from_dict(_fake_observation(held.config))
    noise = torch.randn(len(observation.state), held.config.action_horizon, held.config.action_dim)
    results = []
    for model in (held, plain):
        for key, layer in lora_layers(model).items():
            torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(len(key)))
        model.train()
        model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        loss = model(observation, noise + 1, noise, torch.full((len(noise),), 0.3))
        loss.mean().backward()
        results.append([loss] + [parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(results[0]) > 100
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_compiled_and_switching_adapters_it_samples_the_same_bits(build, tmp_path):
    model = build("int8", pi05=True).eval()
    shake(model)
    save_adapter(model, tmp_path / "other")
    shake(model)
    switcher = Switcher(model, {"other": tmp_path / "other"})
    assert_one_graph(model, [switcher.using(None), switcher.using("other")])


def no_library(monkeypatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _: None)


def old_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))


@pytest.mark.parametrize(
    ("name", "machine", "told"),
    [("nf4", no_library, r"openpi-lora-patch\[quant\]"), ("fp8", old_card, r"(?s)8\.6.*8\.9 or newer")],
)
def test_what_is_missing_is_said_before_anything_is_built_or_loaded(build, name, machine, told, monkeypatch):
    machine(monkeypatch)
    monkeypatch.setattr(pi0_pytorch.PaliGemmaWithExpertModel, "__init__", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(LoRAError, match=told):
        build(name)
