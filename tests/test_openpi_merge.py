"""A merged checkpoint in openpi as it is, with its files copied into transformers and without this package.

Skipped where openpi cannot be imported, or where transformers is not the release that its files are made for.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

if transformers.__version__ != "4.53.2":
    pytest.skip("openpi's files are made for transformers 4.53.2", allow_module_level=True)

from safetensors.torch import load_file, save_file, save_model

from golden import GOLDEN
from openpi_lora_patch import merge
from openpi_lora_patch.checkpoint import adapters
from openpi_lora_patch.reference import CAMERAS, Reference, distance
from test_adapters import train
from test_openpi import golden_model, observation, openpi

# Computes with openpi's own model, at the sizes of a golden file, what `sys.argv` asks for: config, input, output.
_STOCK = """
import json, sys, types
import openpi.models.gemma as variants
from openpi.models.pi0_config import Pi0Config
from openpi.models_pytorch import gemma_pytorch, preprocessing_pytorch
from safetensors.torch import load_file, save_file
import torch

config, checkpoint, given, found = json.loads(sys.argv[1]), *sys.argv[2:]
vision = config["paligemma"]["vision"]
towers = {"gemma_2b": config["paligemma"]["text"], "gemma_300m": config["expert"]}
names = {"width": "hidden_size", "depth": "num_hidden_layers", "mlp_dim": "intermediate_size",
         "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
variants.get_config = lambda name: variants.Config(**{ours: towers[name][key] for ours, key in names.items()})
stock = gemma_pytorch.PaliGemmaForConditionalGeneration
def small(config):
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim"):
        setattr(config.vision_config, name, vision[name])
    return stock(config)
gemma_pytorch.PaliGemmaForConditionalGeneration = small
right = preprocessing_pytorch.preprocess_observation_pytorch
preprocessing_pytorch.preprocess_observation_pytorch = lambda seen, train: right(seen, train=False)

torch.set_num_threads(1)
sizes = {name: config[name] for name in ("pi05", "dtype", "action_dim", "action_horizon", "max_token_len")}
sizes = Pi0Config(pytorch_compile_mode=None, **sizes)
model = sizes.load_pytorch(types.SimpleNamespace(model=sizes), checkpoint).eval()
inputs = load_file(given)
group = lambda kind: {key.removeprefix(kind): value for key, value in inputs.items() if key.startswith(kind)}
seen = types.SimpleNamespace(images=group("image/"), image_masks=group("mask/"), token_ar_mask=None,
                             token_loss_mask=None, **group("seen/"))
with torch.no_grad():
    loss = model(seen, inputs["actions"], inputs["noise"], inputs["time"])
    actions = model.sample_actions("cpu", seen, inputs["noise"], config["num_steps"])
assert not [name for name in sys.modules if name.startswith("openpi_lora_patch")]
save_file({"loss": loss.contiguous(), "actions": actions.contiguous()}, found)
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A folder with a transformers into which openpi's files were copied, as openpi's README says."""
    folder = tmp_path_factory.mktemp("copied")
    stock = Path(transformers.__file__).parent
    shutil.copytree(stock, folder / "transformers", copy_function=os.symlink, ignore=shutil.ignore_patterns("*.pyc"))
    replacements = Path(openpi.__file__).parent / "models_pytorch" / "transformers_replace"
    for path in replacements.rglob("*.py"):
        target = folder / "transformers" / path.relative_to(replacements)
        target.unlink(missing_ok=True)
        shutil.copyfile(path, target)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_stock_openpi_computes_what_we_compute_unmerged(tmp_path, monkeypatch, copied, name, dtype):
    data = Reference(GOLDEN / f"{name}_float32.safetensors")
    save_model(golden_model(data, monkeypatch), tmp_path / "base.safetensors")
    model = train(golden_model(data, monkeypatch, lora=True), 0)
    adapters.save_adapter(model, tmp_path / "adapter")
    arguments = [str(tmp_path / name) for name in ("base.safetensors", "adapter", "merged")]
    assert merge.main([*arguments[:2], "--out", arguments[2], "--dtype", dtype]) == 0

    seen = observation(data)
    inputs = {name: data.inputs[name] for name in ("actions", "noise", "time")}
    inputs |= {f"image/{camera}": seen.images[camera] for camera in CAMERAS}
    inputs |= {f"mask/{camera}": seen.image_masks[camera] for camera in CAMERAS}
    inputs |= {f"seen/{name}": getattr(seen, name) for name in ("tokenized_prompt", "tokenized_prompt_mask", "state")}
    save_file(inputs, tmp_path / "inputs")
    merged = tmp_path / "merged" / "model.safetensors"
    environment = {name: text for name, text in os.environ.items() if not name.startswith("OPENPI_LORA")}
    environment |= {
        "OPENPI_LORA": "0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(copied), *filter(None, sys.path)]),
    }
    command = [sys.executable, "-c", _STOCK, json.dumps(data.config), str(merged), str(tmp_path / "inputs")]
    done = subprocess.run([*command, str(tmp_path / "found")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found")

    model.eval().requires_grad_(False)
    loss = model(seen, *(inputs[name] for name in ("actions", "noise", "time")))
    actions = model.sample_actions("cpu", seen, inputs["noise"], data.config["num_steps"])
    error = max(distance(found["loss"], loss), distance(found["actions"], actions))
    assert error < {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
