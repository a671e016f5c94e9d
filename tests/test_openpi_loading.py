"""openpi's own scripts load a tensor at a time and hold nothing that is not used. Skipped without openpi."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_file, save_model

if importlib.util.find_spec("openpi") is None:
    pytest.skip("openpi cannot be imported here", allow_module_level=True)
training = pytest.importorskip("openpi.training.config", reason="openpi's dependencies are missing")

import openpi
from openpi.models.model import Observation
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

import openpi_lora_patch
from openpi_lora_patch.errors import CheckpointError
from openpi_lora_patch.lora.quantized import HeldLinear
from openpi_lora_patch.verify import _fake_observation

TRAIN = Path(openpi.__file__).parents[2] / "scripts" / "train_pytorch.py"
CONFIG = "debug_lora_pytorch"
# Does what argv 1 says with the checkpoint's folder, argv 2; prints how many bytes of memory the process had at most,
# before its model was built and when that was loaded. openpi's small towers, with MLPs of some hundred MB.
CHILD = """
import dataclasses, logging, os, runpy, sys
import openpi_lora_patch
import openpi.models.gemma as variants
import openpi.models_pytorch.pi0_pytorch as pi0_pytorch
import openpi.training.config as training
import torch
from openpi_lora_patch.checkpoint import files

logging.basicConfig(level=logging.INFO, force=True)
task, folder = sys.argv[1:3]
small, build = variants.get_config, pi0_pytorch.PI0Pytorch
variants.get_config = lambda variant: dataclasses.replace(small(variant), mlp_dim=2**16)
config = training.get_config("debug_lora_pytorch")

def most():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def building(model_config):
    global before
    before = most()
    return build(model_config)

class Loaded(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith(("Loaded PyTorch weights", "Loaded model state")):
            print(before, most(), flush=True)
            os._exit(0)

if task == "write":
    plain = dataclasses.replace(config.model, paligemma_variant="dummy", action_expert_variant="dummy")
    with torch.device("meta"):
        state = build(plain).state_dict()
    del state["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"]
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    ones = ((name, torch.ones_like(tensor, device="cpu")) for name, tensor in state.items())
    files.write_tensors(files.pathlib.Path(folder, "model.safetensors"), specs, ones, {})
elif task == "serve":
    before = most()
    model = config.model.load_pytorch(config, os.path.join(folder, "model.safetensors"))
    model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    print(before, most())
else:
    pi0_pytorch.PI0Pytorch = building
    logging.getLogger().addHandler(Loaded())
    sys.argv = [task, "debug_lora_pytorch", "--exp_name", "e", "--pytorch_weight_path", folder, "--overwrite"]
    runpy.run_path(task, run_name="__main__")
"""


def child(*arguments, **variables):
    more = {"JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | more | variables, cwd=arguments[1], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    result = child("write", folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory a process had")
@pytest.mark.parametrize("task", ["serve", TRAIN], ids=["load_pytorch", "train_pytorch.py"])
@pytest.mark.parametrize(("base", "held"), [("bf16", 1.0), ("int8", 0.7)])
def test_its_scripts_take_what_the_model_holds_and_little_more(task, base, held, large):
    result = child(task, large, OPENPI_LORA_BASE=base)
    assert result.returncode == 0, result.stderr
    before, most = map(int, result.stdout.split()[-2:])
    whole = (large / "model.safetensors").stat().st_size
    assert whole > 250e6
    assert (most - before) / whole < held + 0.5  # The whole file besides would be 1 more.


def test_its_scripts_keep_the_quantised_base_and_take_it_from_there(large):
    settings = {"OPENPI_LORA_BASE": "int8", "OPENPI_LORA_BASE_CACHE": "1"}
    told = ["is kept in", "is read from"]
    for task, expected in ((TRAIN, told[:1]), (TRAIN, told[1:]), ("serve", told[1:])):
        result = child(task, large, **settings)
        assert result.returncode == 0, result.stderr
        assert [text for text in told if text in result.stderr] == expected
    (large / "model.safetensors.int8").unlink()


@pytest.fixture(params=["bf16", "int8"])
def model(request):
    openpi_lora_patch.deactivate()
    openpi_lora_patch.activate(base=request.param)
    yield PI0Pytorch(training.get_config(CONFIG).model)
    openpi_lora_patch.deactivate()
    openpi_lora_patch.activate()


def size(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def test_nothing_is_held_that_is_not_used(model):
    observation = Observation.from_dict(_fake_observation(model.config))
    actions = torch.randn(len(observation.state), model.config.action_horizon, model.config.action_dim)
    optimizer = torch.optim.AdamW(model.parameters())  # All of them, as openpi's script gives it.
    model.train()(observation, actions).mean().backward()
    optimizer.step()
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert size(p.grad for p in parameters if p.grad is not None) == size(trained)
    states = [tensor for state in optimizer.state.values() for name, tensor in state.items() if name != "step"]
    assert size(states) == 2 * size(trained)
    assert model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight.grad is None
    # Of what state dicts hold, with a tied weight once, all but the expert's `lm_head` and what is quantised.
    state = model.state_dict()
    held = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, HeldLinear)}
    assert "paligemma_with_expert.gemma_expert.lm_head.weight" in held
    tied = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    assert size(parameters) == size(tensor for name, tensor in state.items() if name not in held | {tied})


def test_state_dicts_have_openpis_keys_and_files_load_with_the_unused_ones_and_without(model, tmp_path):
    config = training.get_config(CONFIG).model
    plain = PI0Pytorch(type(config)(paligemma_variant="dummy", action_expert_variant="dummy"))
    state = plain.state_dict()
    found = {name.replace(".base_layer.", ".") for name in model.state_dict() if ".lora_" not in name}
    assert found == state.keys()
    unused = "paligemma_with_expert.gemma_expert.lm_head.weight"
    save_model(plain, tmp_path / "with.safetensors")
    del state["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"]
    save_file({name: tensor for name, tensor in state.items() if name != unused}, tmp_path / "without.safetensors")
    before = model.state_dict()[unused].clone()
    load_model(model, tmp_path / "without.safetensors")
    assert torch.equal(model.state_dict()[unused], before)
    load_model(model, tmp_path / "with.safetensors")
    assert torch.equal(model.state_dict()[unused], state[unused])
    save_model(model, tmp_path / "saved.safetensors")
    assert torch.equal(model.state_dict()[unused], state[unused])


def test_a_strict_load_that_lacks_a_tensor_or_has_one_too_many_changes_nothing(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in before.items()}
    some = {name: tensor for name, tensor in other.items() if name != "action_out_proj.bias"}
    for state in (some, other | {"foreign": torch.ones(1)}, some | {"foreign": torch.ones(1)}):
        with pytest.raises(CheckpointError, match="nothing was loaded"):
            model.load_state_dict(state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(other)
    assert torch.equal(model.action_out_proj.bias, other["action_out_proj.bias"])
    assert model.load_state_dict(some, strict=False).missing_keys == ["action_out_proj.bias"]


@pytest.mark.parametrize(("setting", "ours"), [("1", True), ("0", False)])
def test_a_setting_leaves_its_scripts_initialisation_alone(child, setting, ours):
    code = """
import openpi_lora_patch
import openpi.training.config as training
before = training.cli
openpi_lora_patch.deactivate()
print(training.cli is not before)
"""
    result = child("-c", code, OPENPI_LORA_SKIP_INIT=setting)
    assert result.stdout == f"{ours}\n", result.stderr
