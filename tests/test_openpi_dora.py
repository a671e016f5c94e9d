"""DoRA in openpi's own scripts, unmodified: trained, resumed, served. Skipped where openpi cannot be imported."""

import importlib.util
import json

import pytest
import torch

if importlib.util.find_spec("openpi") is None:
    pytest.skip("openpi cannot be imported here", allow_module_level=True)
training = pytest.importorskip("openpi.training.config", reason="openpi's dependencies are missing")

import numpy as np
from openpi.models.pi0_config import Pi0Config
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
from openpi.policies import policy_config
from safetensors.torch import load_model, save_model

import openpi_lora_patch
from openpi_lora_patch import convert
from openpi_lora_patch.checkpoint import adapters
from openpi_lora_patch.lora import DoRALinear, lora_layers
from test_openpi import CONFIG, request, start


@pytest.fixture
def activated():
    """Activates with settings of a test's own."""

    def activate(**settings):
        openpi_lora_patch.deactivate()
        openpi_lora_patch.activate(**settings)

    yield activate
    openpi_lora_patch.deactivate()
    openpi_lora_patch.activate()


@pytest.mark.parametrize(
    "options", [{}, {"base": "int8", "base_cache": "1", "save": "adapter", "checkpoint": "layer"}], ids=str
)
def test_train_resume_and_serve(tmp_path, activated, options):
    base = tmp_path / "base" / "model.safetensors"
    base.parent.mkdir()
    torch.manual_seed(0)
    plain = PI0Pytorch(Pi0Config(paligemma_variant="dummy", action_expert_variant="dummy", pytorch_compile_mode=None))
    save_model(plain, base)
    common = ("train_pytorch.py", CONFIG, "--exp_name", "t", "--save_interval", "2", "--log_interval", "1")
    weights = ("--pytorch_weight_path", str(base.parent))
    variables = {f"OPENPI_LORA_{name.upper()}": value for name, value in options.items()} | {"OPENPI_LORA_DORA": "1"}
    log = tmp_path / "log"
    for more in (("--num_train_steps", "2"), ("--resume", "--num_train_steps", "4")):
        with log.open("w") as out:
            process = start(*common, *weights, *more, folder=tmp_path, log=out, **variables)
            assert process.wait(timeout=240) == 0, log.read_text()
        # 56 Linears, three tensors each.
        assert "Found 168 LoRA parameters after model creation" in log.read_text()
        assert log.read_text().count("OPENPI_LORA_FUSED does not apply") == 1
    assert "Resumed training from step 2" in log.read_text()

    last = tmp_path / "checkpoints" / CONFIG / "t" / "4"
    activated(dora=True, base_weights=str(base), **options)
    model = PI0Pytorch(training.get_config(CONFIG).model)
    load_model(model, base)
    before = {name: layer.lora_magnitude_vector.detach().clone() for name, layer in lora_layers(model).items()}
    load_model(model, last / "model.safetensors")
    layers = lora_layers(model)
    assert all(isinstance(layer, DoRALinear) for layer in layers.values())
    assert all(layer.lora_B.any() for name, layer in layers.items() if "gemma_expert" in name)
    # In openpi's warm-up, steps of 1e-8 move those whose float32 neighbours are as near.
    assert any(not torch.equal(layer.lora_magnitude_vector, before[name]) for name, layer in layers.items())
    for name, layer in layers.items():
        torch.testing.assert_close(layer.lora_magnitude_vector.detach(), before[name], rtol=1e-5, atol=0)

    config = training.get_config(CONFIG)
    policy = policy_config.create_trained_policy(config, last, pytorch_device="cpu")
    noise = np.ones((config.model.action_horizon, config.model.action_dim), np.float32)
    actions = policy.infer(request(config.model), noise=noise)["actions"]
    assert np.isfinite(actions).all()
    if options:
        assert convert.main(["training", str(last), "--out", str(tmp_path / "adapter")]) == 0
        assert json.loads((tmp_path / "adapter" / adapters.CONFIG).read_text())["use_dora"] is True
