"""openpi's unmodified scripts with adapter-only checkpoints. Skipped where openpi cannot be imported."""

import importlib.util
import os
import subprocess
import sys
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

from openpi_lora_patch.checkpoint import adapters

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


def run(*arguments, folder, **variables):
    environment = os.environ | {"OPENPI_LORA": "1", "JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled"} | variables
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_train_resume_and_serve_with_adapters_only(tmp_path):
    base = tmp_path / "base" / "model.safetensors"
    base.parent.mkdir()
    torch.manual_seed(7)
    variants = {"paligemma_variant": "dummy", "action_expert_variant": "dummy"}
    plain = PI0Pytorch(Pi0Config(pytorch_compile_mode=None, **variants))
    safetensors.torch.save_model(plain, base)

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
from openpi_lora_patch.checkpoint import adapters
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
