"""openpi's own unmodified code on stock transformers. Skipped where openpi cannot be imported.

To run it: a checkout of openpi with its `src` and `packages/openpi-client/src` on PYTHONPATH, and its dependencies.
"""

import hashlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("openpi") is None:
    pytest.skip("openpi cannot be imported here", allow_module_level=True)
training = pytest.importorskip("openpi.training.config", reason="openpi's dependencies are missing")

import numpy as np
import openpi
import openpi.models.gemma as variants
import openpi.models_pytorch.preprocessing_pytorch as preprocessing
import safetensors.torch
import transformers
from openpi.models.pi0_config import Pi0Config
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
from openpi.policies import policy_config

from golden import GOLDEN, assert_same
from openpi_lora_patch import FrozenParametersError, LoRAError
from openpi_lora_patch.apply import Counts
from openpi_lora_patch.lora import lora_layers
from openpi_lora_patch.patches import paligemma
from openpi_lora_patch.reference import CAMERAS, Reference
from openpi_lora_patch.verify import _fake_observation
from test_pi0 import COUNTS

SCRIPTS = Path(openpi.__file__).parents[2] / "scripts"
NAMES = ("pi0_libero_lora_pytorch", "pi05_libero_lora_pytorch", "debug_lora_pytorch")
CONFIG = "debug_lora_pytorch"
OPENPIS_VARIANTS = variants.get_config


def environment(**more):
    return os.environ | {"OPENPI_LORA": "1", "JAX_PLATFORMS": "cpu", "WANDB_MODE": "disabled"} | more


def digests(folder):
    """SHA-256 of every file, but for the bytecode that Python caches."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("pi05", "towers"), COUNTS)
def test_full_size_counts(pi05, towers):
    variants = {
        "paligemma_variant": "gemma_2b_lora" if "paligemma" in towers else "gemma_2b",
        "action_expert_variant": "gemma_300m_lora" if "action_expert" in towers else "gemma_300m",
    }
    with torch.device("meta"):
        model = PI0Pytorch(Pi0Config(pi05=pi05, pytorch_compile_mode=None, **variants))
    assert Counts.of(model) == Counts(*COUNTS[pi05, towers])


def test_the_configs_are_in_openpis_list():
    for name in NAMES:
        config = training.get_config(name)
        assert config.model.paligemma_variant.endswith("_lora")
        assert config.model.action_expert_variant.endswith("_lora")
    assert training.get_config("pi05_libero_lora_pytorch").model.pi05
    assert len({config.name for config in training._CONFIGS}) == len(training._CONFIGS)


def test_a_config_without_weights_fails_before_it_trains(tmp_path):
    path = training.get_config("pi0_libero_lora_pytorch").pytorch_weight_path
    arguments = (CONFIG, "--exp_name", "none", "--num_train_steps", "1", "--pytorch_weight_path", path)
    log = tmp_path / "train.log"
    with log.open("w") as out:
        assert start("train_pytorch.py", *arguments, folder=tmp_path, log=out).wait(timeout=240) == 1
    text = log.read_text()
    assert f"No such file or directory: {path}/model.safetensors" in text
    assert "Training:" not in text, "openpi shows its progress once it trains"


def test_unknown_lora_kinds_are_refused(monkeypatch):
    known = variants.get_config("dummy_lora")
    monkeypatch.setitem(known.lora_configs, "vision", known.lora_configs["attn"])
    monkeypatch.setattr(variants, "get_config", lambda variant: known)
    with pytest.raises(LoRAError, match="vision"):
        PI0Pytorch(training.get_config(CONFIG).model)


def test_a_stray_thaw_is_caught_in_openpis_own_forward():
    config = training.get_config(CONFIG).model
    model = PI0Pytorch(config).train()
    model.requires_grad_(True)
    observation = type(config.fake_obs(1)).from_dict(_fake_observation(config))
    with pytest.raises(FrozenParametersError, match="thawed"):
        model(observation, torch.zeros(2, config.action_horizon, config.action_dim))


def test_the_serving_cast_keeps_adapters_float32():
    model = PI0Pytorch(training.get_config(CONFIG).model)
    model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    layers = lora_layers(model).values()
    assert {layer.lora_A.dtype for layer in layers} == {torch.float32}
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["pi0_float32", "pi0_bfloat16", "pi05_float32", "pi05_bfloat16"])
def test_openpis_own_model_gives_openpis_own_outputs(name, monkeypatch):
    data = Reference(GOLDEN / f"{name}.safetensors")
    model = golden_model(data, monkeypatch)
    arguments = [data.inputs[key] for key in ("actions", "noise", "time")]
    loss = model.train()(observation(data), *arguments)
    assert_same(loss, data.outputs["loss"])
    loss.mean().backward()
    parameters = dict(model.named_parameters())
    for key, gradient in data.grads.items():
        assert_same(parameters[key].grad[: len(gradient)], gradient)
    sampled = model.eval().sample_actions("cpu", observation(data), arguments[1], data.config["num_steps"])
    assert_same(sampled, data.outputs["sample_actions"])


def golden_model(data, monkeypatch, *, lora=False):
    """openpi's `PI0Pytorch` at the sizes, and with the weights, of a golden file; adapters are those of openpi."""
    towers = {"gemma_2b": data.config["paligemma"]["text"], "gemma_300m": data.config["expert"]}
    towers = {f"{name}_lora" if lora else name: config for name, config in towers.items()}
    known = {name: OPENPIS_VARIANTS(name).lora_configs for name in towers}
    monkeypatch.setattr(variants, "get_config", lambda name: tower(towers[name], known[name]))
    right = preprocessing.preprocess_observation_pytorch
    monkeypatch.setattr(preprocessing, "preprocess_observation_pytorch", lambda seen, train: right(seen, train=False))
    sizes = {key: data.config[key] for key in ("pi05", "dtype", "action_dim", "action_horizon", "max_token_len")}
    paligemma_variant, action_expert_variant = towers
    sizes |= {"paligemma_variant": paligemma_variant, "action_expert_variant": action_expert_variant}
    with paligemma.vision_config(**vision_sizes(data)):
        model = PI0Pytorch(Pi0Config(pytorch_compile_mode=None, **sizes))
    expected = {key.replace("base_layer.", ""): t for key, t in model.state_dict().items() if ".lora_" not in key}
    assert expected.keys() == data.state.keys()
    assert {key: t.dtype for key, t in expected.items()} == {key: t.dtype for key, t in data.state.items()}
    # openpi fixes the vocabulary at 257152 rows, of which the golden data has the first 128.
    model.load_state_dict({key: rows(tensor, len(expected[key])) for key, tensor in data.state.items()})
    return model


def vision_sizes(data):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = data.config["paligemma"]["vision"]
    return {name: vision[name] for name in names}


def tower(config, lora_configs):
    return variants.Config(
        lora_configs=lora_configs,
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        mlp_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
    )


def rows(tensor, count):
    return torch.cat([tensor, tensor.new_zeros(count - len(tensor), *tensor.shape[1:])])


def observation(data):
    ours = data.observation()
    return types.SimpleNamespace(
        images=dict(zip(CAMERAS, ours.images, strict=True)),
        image_masks=dict(zip(CAMERAS, ours.image_masks, strict=True)),
        tokenized_prompt=ours.tokens,
        tokenized_prompt_mask=ours.token_mask,
        state=ours.state,
        token_ar_mask=None,
        token_loss_mask=None,
    )


def start(*arguments, folder, log, **variables):
    command = [sys.executable, str(SCRIPTS / arguments[0]), *arguments[1:]]
    return subprocess.Popen(command, cwd=folder, env=environment(**variables), stdout=log, stderr=subprocess.STDOUT)


def wait_for(process, log, *texts, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        content = log.read_text()
        if all(text in content for text in texts):
            return content
        assert process.poll() in (None, 0), content
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {texts} in\n{log.read_text()}")


def test_train_kill_resume_and_serve(tmp_path):
    stock = Path(transformers.__file__).parent
    before = digests(stock)
    base = tmp_path / "base" / "model.safetensors"
    base.parent.mkdir()
    model_config = training.get_config(CONFIG).model
    plain = PI0Pytorch(Pi0Config(paligemma_variant="dummy", action_expert_variant="dummy", pytorch_compile_mode=None))
    safetensors.torch.save_model(plain, base)

    log, run = tmp_path / "train.log", tmp_path / "checkpoints" / CONFIG / "t"
    common = ("train_pytorch.py", CONFIG, "--exp_name", "t", "--save_interval", "2", "--log_interval", "1")
    weights = ("--pytorch_weight_path", str(base.parent))
    with log.open("w") as out:
        process = start(*common, *weights, "--num_train_steps", "1000", folder=tmp_path, log=out)
        try:
            first = wait_for(process, log, "Saved checkpoint at step 4")
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert "Found 112 LoRA parameters after model creation" in first
    assert "Freeze paligemma: True, freeze action expert: True" in first
    assert "The checkpoint holds no adapters" in first

    saved = max(int(path.name) for path in run.iterdir() if path.name.isdigit())
    with log.open("w") as out:
        resumed = start(*common, *weights, "--resume", "--num_train_steps", str(saved + 2), folder=tmp_path, log=out)
        assert resumed.wait(timeout=240) == 0, log.read_text()
    assert f"Resumed training from step {saved}" in log.read_text()

    last = run / str(saved + 2)
    trained = PI0Pytorch(model_config)
    safetensors.torch.load_model(trained, last / "model.safetensors")
    frozen = {name for name, parameter in trained.named_parameters() if not parameter.requires_grad}
    base_state = plain.state_dict()
    for name in frozen:
        assert torch.equal(trained.state_dict()[name], base_state[name.replace("base_layer.", "")]), name
    # A learning rate of 1e-8 in openpi's warm-up moves float32 adapters, which a bfloat16 would have lost.
    assert any(layer.lora_B.any() for layer in lora_layers(trained).values())

    policy = policy_config.create_trained_policy(training.get_config(CONFIG), last, pytorch_device="cpu")
    noise = np.zeros((model_config.action_horizon, model_config.action_dim), np.float32)
    expected = policy.infer(request(model_config), noise=noise)["actions"]
    assert expected.shape == noise.shape
    assert np.isfinite(expected).all()
    serve_and_ask(last, request(model_config), expected.shape, folder=tmp_path)
    assert digests(stock) == before


def request(config):
    return {
        "image": {camera: np.zeros((224, 224, 3), np.uint8) for camera in CAMERAS},
        "image_mask": dict.fromkeys(CAMERAS, np.True_),
        "state": np.zeros(config.action_dim, np.float32),
        "tokenized_prompt": np.zeros(config.max_token_len, np.int32),
        "tokenized_prompt_mask": np.ones(config.max_token_len, bool),
    }


def serve_and_ask(checkpoint, observation, shape, *, folder):
    client = pytest.importorskip("openpi_client.websocket_client_policy", reason="openpi's client is missing")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "serve.log"
    policy = ("policy:checkpoint", "--policy.config", CONFIG, "--policy.dir", str(checkpoint))
    with log.open("w") as out:
        server = start("serve_policy.py", "--port", str(port), *policy, folder=folder, log=out)
        try:
            wait_for(server, log, "server listening")
            answer = client.WebsocketClientPolicy("127.0.0.1", port).infer(observation)
        finally:
            server.kill()
            server.wait()
    assert answer["actions"].shape == shape
    assert np.isfinite(answer["actions"]).all()


def test_serving_builds_without_initialising_and_adapters_that_a_base_lacks_start_afresh(tmp_path):
    sizes = {"action_expert_variant": "dummy", "pytorch_compile_mode": None, "action_horizon": 4}
    base = PI0Pytorch(Pi0Config(paligemma_variant="dummy", **sizes))
    safetensors.torch.save_model(base, tmp_path / "model.safetensors")
    config, seed = Pi0Config(paligemma_variant="dummy_lora", **sizes), torch.get_rng_state()
    model = config.load_pytorch(types.SimpleNamespace(model=config), str(tmp_path / "model.safetensors"))
    state = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
    for name, value in base.state_dict().items():
        assert torch.equal(state[name], value), name
    torch.set_rng_state(seed)
    for layer in lora_layers(model).values():  # The only ones that drew random numbers.
        expected = torch.empty_like(layer.lora_A)
        torch.nn.init.kaiming_uniform_(expected, a=5**0.5)
        assert torch.equal(layer.lora_A, expected)
        assert not layer.lora_B.any()
