"""Merging: a plain checkpoint with the adapted model's outputs, and honest figures for what rounding costs."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from openpi_lora_patch import merge as command
from openpi_lora_patch.checkpoint import adapters
from openpi_lora_patch.checkpoint import merge as merging
from openpi_lora_patch.errors import CheckpointError
from openpi_lora_patch.lora import lora_layers
from openpi_lora_patch.reference import distance
from test_adapters import DATA, loss, pi0


@pytest.fixture
def folders(tmp_path):
    """A plain base, an adapter trained on it, the model they make, and a name for the result."""
    model = pi0(seed=0)
    (tmp_path / "base").mkdir()
    save_model(DATA.pi0(), tmp_path / "base" / "model.safetensors")
    adapters.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", tmp_path / "out", model


@pytest.mark.parametrize("preset", ["default", "jax", "adapters"])
@pytest.mark.parametrize("expert", [True, False])
def test_a_plain_model_loads_it_strictly_and_computes_the_same(tmp_path, preset, expert):
    model = pi0(preset, expert=expert, seed=0)
    save_model(DATA.pi0(), tmp_path / "base.safetensors")
    adapters.save_adapter(model, tmp_path / "adapter")
    merging.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out")
    plain = DATA.pi0()
    assert load_model(plain, tmp_path / "out" / "model.safetensors") == (set(), [])
    assert distance(loss(plain), loss(model)) < 1e-5


def test_every_tensor_is_the_float32_sum_or_what_was_trained(folders):
    base, adapter, out, model = folders
    merging.merge(base, adapter, out)
    merged, plain, state = (
        load_file(out / "model.safetensors"),
        load_file(base / "model.safetensors"),
        model.state_dict(),
    )
    layers = lora_layers(model)
    for name, tensor in merged.items():
        layer = layers.get(name.removesuffix(".weight"))
        expected = state.get(name, plain[name]) if layer is None else plain[name] + layer.delta_weight()
        assert torch.equal(tensor, expected), name


def test_rounding_is_measured(folders):
    base, adapter, out, model = folders
    report = merging.merge(base, adapter, out, dtype=torch.bfloat16)
    merged, plain = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert report.keys() == lora_layers(model).keys()
    for name, cost in report.items():
        assert merged[f"{name}.weight"].dtype == torch.bfloat16
        error = merged[f"{name}.weight"].float() - (plain[f"{name}.weight"] + lora_layers(model)[name].delta_weight())
        assert cost.worst == pytest.approx(error.abs().max().item())
        assert 0 < cost.mean < cost.worst
        assert cost.kept == pytest.approx(1.0, abs=0.05)


def test_a_small_change_that_bfloat16_loses_is_reported():
    weight = torch.full((4, 4), 1.0)
    cost = merging._rounding(weight, torch.full((4, 4), 1e-4), weight)
    assert cost.kept == 0.0
    assert cost.worst == pytest.approx(1e-4, rel=1e-3)


def test_the_wrong_base_is_refused_and_nothing_is_written(folders):
    base, adapter, out, _ = folders
    path = base / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * 1.02 for name, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError, match="another base"):
        merging.merge(base, adapter, out)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.0.self_attn" not in name}, path)
    with pytest.raises(CheckpointError, match="does not fit"):
        merging.merge(base, adapter, out)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        merging.merge(base, adapter, out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["adapter", "base"]


def test_no_space_and_no_permission_are_errors_that_leave_nothing(folders, monkeypatch):
    base, adapter, out, _ = folders
    with monkeypatch.context() as patched:
        usage = merging.files.shutil.disk_usage(base)._replace(free=10)
        patched.setattr(merging.files.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(CheckpointError, match="no space"):
            merging.merge(base, adapter, out)

    def refuse(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr(merging.files.tempfile, "mkdtemp", refuse)
    with pytest.raises(CheckpointError, match="not yours"):
        merging.merge(base, adapter, out)
    assert sorted(p.name for p in out.parent.iterdir()) == ["adapter", "base"]


def test_a_kill_at_any_moment_leaves_whole_files(tmp_path):
    names = [f"l{number}" for number in range(20)]
    save_file({f"{name}.weight": torch.ones(128, 128) for name in names}, tmp_path / "base.safetensors")
    shapes = {"A": (4, 128), "B": (128, 4)}
    tensors = {f"base_model.model.{n}.lora_{m}.weight": torch.ones(shape) for n in names for m, shape in shapes.items()}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    adapters.write_adapter(adapters.Adapter(config, tensors, {}), tmp_path / "adapter")
    generator = random.Random(1)
    whole = midway = 0
    for run in range(200):
        folder = tmp_path / str(run)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            for number in itertools.count():
                merging.merge(tmp_path / "base.safetensors", tmp_path / "adapter", folder / str(number))
        time.sleep(generator.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        for path in folder.iterdir():
            if path.name.startswith("."):
                midway += 1
                continue
            whole += 1
            merged = load_file(path / "model.safetensors")
            assert len(merged) == len(names)
            assert all((tensor == 5).all() for tensor in merged.values())
    assert midway > 20, "the kills came too late or too early to show anything"
    assert whole > 5


def test_the_command(folders, capsys):
    base, adapter, out, model = folders
    assert command.main([str(base), str(adapter), "--out", str(out), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in lora_layers(model))
    assert command.main([str(base), str(adapter), "--out", str(out)]) == 1
    assert "there already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["merge", "convert"])
def test_help_has_an_example(name):
    done = subprocess.run(
        [sys.executable, "-m", f"openpi_lora_patch.{name}", "--help"], capture_output=True, text=True, check=True
    )
    assert f"python -m openpi_lora_patch.{name} " in done.stdout.split("example")[1]
