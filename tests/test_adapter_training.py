"""openpi's unmodified scripts with adapter-only checkpoints. Skipped where openpi cannot be imported."""

import importlib.util
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if importlib.util.find_spec("openpi") is None:
    pytest.skip("openpi cannot be imported here", allow_module_level=True)
pytest.importorskip("openpi.training.config", reason="openpi's dependencies are missing")

import openpi
import safetensors.torch
import torch
from openpi.models.pi0_config import Pi0Config
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

from openpi_lora_patch.checkpoint import adapters, optimizer

TRAIN = Path(openpi.__file__).parents[2] / "scripts" / "train_pytorch.py"
CONFIG = "debug_lora_pytorch"

# Prints the actions that a policy made as `serve_policy.py` makes it infers, or the error's first line.
_SERVE = f"""
import sys, numpy as np
from openpi.policies import policy_config
from openpi.training import config
train_config = config.get_config("{CONFIG}")
try:
    policy = policy_config.create_trained_policy(train_config, sys.argv[1], pytorch_device="cpu")
except Exception as error:
    sys.exit(str(error))
model = train_config.model
cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
request = {{
    "image": {{camera: np.zeros((224, 224, 3), np.uint8) for camera in cameras}},
    "image_mask": dict.fromkeys(cameras, np.True_),
    "state": np.zeros(model.action_dim, np.float32),
    "tokenized_prompt": np.zeros(model.max_token_len, np.int32),
    "tokenized_prompt_mask": np.ones(model.max_token_len, bool),
}}
if len(sys.argv) > 2:
    request["adapter"] = sys.argv[2]
noise = np.zeros((model.action_horizon, model.action_dim), np.float32)
print("actions", policy.infer(request, noise=noise)["actions"].tobytes().hex())
"""


# Runs openpi's script (argv from 2 on) with batches and random numbers that the step decides. openpi's loader starts
# anew when a run is resumed, and so do its random numbers; argv 1 is the step to start at.
_TRAIN_BY_STEP = """
import runpy, sys
import torch
import openpi.training.data_loader as data
create, first = data.create_data_loader, int(sys.argv[1])

class ByStep:
    def __init__(self, loader):
        self.data_config, self.loader = loader.data_config, loader

    def __iter__(self):
        for step, batch in enumerate(self.loader):
            if step >= first:
                torch.manual_seed(step)
                yield batch

data.create_data_loader = lambda *args, **kwargs: ByStep(create(*args, **kwargs))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def environment(**variables):
    return os.environ | {"OPENPI_LORA": "1", "JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled"} | variables


def run(*arguments, folder, **variables):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_killed_and_resumed_run_ends_with_the_bits_of_one_that_was_not(tmp_path):
    base = tmp_path / "base" / "model.safetensors"
    save_base(base)
    common = (TRAIN, CONFIG, "--save_interval", "2", "--num_train_steps", "8", "--pytorch_weight_path", base.parent)

    def command(first, name, *more):
        return [sys.executable, "-c", _TRAIN_BY_STEP, *map(str, (first, *common, "--exp_name", name, *more))]

    variables = {"cwd": tmp_path, "env": environment(OPENPI_LORA_SAVE="adapter"), "stderr": subprocess.PIPE}
    straight = subprocess.run(command(0, "straight"), **variables, timeout=300)
    assert straight.returncode == 0, straight.stderr.decode()
    with subprocess.Popen(command(0, "killed"), **variables, text=True) as process:
        for line in process.stderr:
            if "Saved checkpoint at step 4" in line:
                process.kill()
    assert process.returncode == -signal.SIGKILL
    runs = tmp_path / "checkpoints" / CONFIG
    steps = [int(path.name) for path in (runs / "killed").iterdir() if path.name.isdigit()]
    assert 4 <= max(steps) < 8
    resumed = subprocess.run(command(max(steps), "killed", "--resume"), **variables, timeout=300)
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert f"Resumed training from step {max(steps)}" in resumed.stderr.decode()

    one, other = (
        safetensors.torch.load_file(runs / name / "8" / "model.safetensors") for name in ("straight", "killed")
    )
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]
    early = safetensors.torch.load_file(runs / "straight" / "4" / "model.safetensors")
    assert [name for name in one if not torch.equal(one[name], early[name])], "nothing was trained"
    one, other = (optimizer.load(runs / name / "8" / "optimizer.pt") for name in ("straight", "killed"))
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for index, state in one["state"].items():
        assert all(torch.equal(tensor, other["state"][index][name]) for name, tensor in state.items())


def save_base(path):
    path.parent.mkdir()
    torch.manual_seed(7)
    variants = {"paligemma_variant": "dummy", "action_expert_variant": "dummy"}
    safetensors.torch.save_model(PI0Pytorch(Pi0Config(pytorch_compile_mode=None, **variants)), path)


def test_train_resume_and_serve_with_adapters_only(tmp_path):
    base = tmp_path / "base" / "model.safetensors"
    save_base(base)
    common = (TRAIN, CONFIG, "--save_interval", 2, "--pytorch_weight_path", base.parent)
    runs = {
        "adapter": ({"OPENPI_LORA_SAVE": "adapter"}, ("--num_train_steps", 3)),
        "whole": ({}, ("--num_train_steps", 5)),
    }
    for name, (variables, arguments) in runs.items():
        done = run(*common, "--exp_name", name, *arguments, folder=tmp_path, **variables)
        assert done.returncode == 0, done.stderr
    arguments = ("--exp_name", "adapter", "--resume", "--num_train_steps", 5)
    done = run(*common, *arguments, folder=tmp_path, OPENPI_LORA_SAVE="adapter")
    assert done.returncode == 0, done.stderr
    assert "Resumed training from step 2" in done.stderr

    checkpoints = {name: tmp_path / "checkpoints" / CONFIG / name / "4" for name in runs}
    sizes = {name: (path / "model.safetensors").stat().st_size for name, path in checkpoints.items()}
    assert sizes["adapter"] < sizes["whole"] / 2
    metadata = adapters.read_adapter(checkpoints["adapter"]).metadata
    assert metadata["model"]["paligemma_variant"] == "dummy_lora"
    assert metadata["openpi_config"] == CONFIG
    assert not [path for path in checkpoints["adapter"].rglob("*") if path.is_file() and zipfile.is_zipfile(path)]

    lost = run("-c", _SERVE, checkpoints["adapter"], folder=tmp_path)
    assert "another base" in lost.stderr
    assert lost.returncode != 0
    served = run("-c", _SERVE, checkpoints["adapter"], folder=tmp_path, OPENPI_LORA_BASE_WEIGHTS=str(base.parent))
    assert served.stdout.startswith("actions "), served.stderr

    # The same checkpoint as a whole model gives the same actions.
    whole = tmp_path / "whole"
    script = f"""
import safetensors.torch
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
from openpi.training import config
from openpi_lora_patch.checkpoint import adapters, optimizer
model = PI0Pytorch(config.get_config("{CONFIG}").model)
safetensors.torch.load_model(model, {str(base)!r})
adapters.load_adapter(model, {str(checkpoints["adapter"])!r})
safetensors.torch.save_model(model, {str(whole / "model.safetensors")!r})
"""
    whole.mkdir()
    (whole / "assets").symlink_to(checkpoints["adapter"] / "assets")
    done = run("-c", script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run("-c", _SERVE, whole, folder=tmp_path).stdout == served.stdout

    # On another adapter's server, a request that names this one gets its actions.
    choice = {"OPENPI_LORA_ADAPTERS": f"trained={checkpoints['adapter']}"}
    start = (_SERVE, checkpoints["whole"])
    assert run("-c", *start, "trained", folder=tmp_path, **choice).stdout == served.stdout
    assert "no adapter of this name" in run("-c", *start, "other", folder=tmp_path, **choice).stderr
