"""Building without random numbers: none are drawn, constants are set, and a strict load gives what it always gives."""

import contextlib
import types

import pytest
import safetensors
import torch
from torch import nn

from golden import GOLDEN
from openpi_lora_patch import build
from openpi_lora_patch.build import checkpoint_follows, complete, initialising
from openpi_lora_patch.patches import openpi_model
from openpi_lora_patch.pi0 import PI0
from openpi_lora_patch.reference import Reference
from openpi_lora_patch.settings import Settings


def test_a_model_that_a_checkpoint_follows_is_built_without_random_numbers_and_loads_the_same(monkeypatch):
    monkeypatch.setattr(build, "_LARGE", 1024)  # What a small model has is large, too.
    data = Reference(GOLDEN / "pi05_float32.safetensors")
    expected = data.pi0()
    before = torch.get_rng_state()
    with checkpoint_follows(), initialising():
        built = PI0(expected.config)
        assert sum(parameter.is_meta for parameter in built.parameters()) > 20
        complete(built)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: t.dtype for name, t in built.named_parameters()} == {
        name: t.dtype for name, t in expected.named_parameters()
    }
    built.load_state_dict(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.equal(built.state_dict()[name], value), name
    assert torch.equal(data.loss(built), data.loss(expected))


def test_constants_are_set_and_other_models_are_initialised():
    torch.manual_seed(0)
    expected = nn.Linear(8, 8).weight
    torch.manual_seed(0)
    with initialising():
        found = nn.Linear(8, 8).weight
    assert torch.equal(found, expected)
    with checkpoint_follows(), initialising():
        norm, linear = nn.LayerNorm(8), nn.Linear(8, 8)
        nn.init.trunc_normal_(linear.weight)
        nn.init.constant_(linear.bias, 3)
    assert torch.equal(norm.weight, torch.ones(8))
    assert not linear.weight.any()
    assert torch.equal(linear.bias, torch.full((8,), 3.0))
    with checkpoint_follows():
        torch.manual_seed(0)
        assert torch.equal(nn.Linear(8, 8).weight, expected), "not while something else is built"


@pytest.mark.parametrize("skip", [True, False])
def test_a_setting_has_models_initialised_all_the_same_and_still_loaded_by_the_tensor(skip):
    class BaseModelConfig:
        def load_pytorch(self):
            return build.follows()

    module = types.SimpleNamespace(BaseModelConfig=BaseModelConfig, safetensors=safetensors)
    with contextlib.ExitStack() as undo:
        openpi_model.patch(module, Settings(skip_init=skip), undo)
        assert BaseModelConfig().load_pytorch() is skip
        assert module.safetensors is not safetensors
    assert not BaseModelConfig().load_pytorch()
