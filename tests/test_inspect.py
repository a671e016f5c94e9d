"""What each kind of checkpoint is said to be."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import save_file, save_model

from golden import GOLDEN
from openpi_lora_patch import inspect as command
from openpi_lora_patch.checkpoint import adapters, training
from openpi_lora_patch.checkpoint.inspect import describe
from openpi_lora_patch.errors import CheckpointError
from openpi_lora_patch.lora import lora_layers
from test_adapters import DATA, pi0


def test_an_adapter_and_its_norms(tmp_path):
    model = pi0(seed=0)
    adapters.save_adapter(model, tmp_path / "adapter", openpi_config="mine")
    for path in (tmp_path / "adapter", tmp_path / "adapter" / adapters.WEIGHTS):
        found = describe(path)
        assert "openpi_lora_patch" in found.kind
        assert found.facts["openpi_config"] == "mine"
        assert found.facts["ranks"] == "2, 4"
        for name, layer in lora_layers(model).items():
            rank, norm = found.deltas[name]
            assert rank == layer.config.rank
            assert norm == pytest.approx(layer.delta_weight().norm().item(), rel=1e-4)


def test_an_adapter_of_peft_and_one_that_is_no_plain_lora(tmp_path):
    adapters.save_adapter(pi0(seed=0), tmp_path / "a")
    folder = tmp_path / "a"
    tensors = adapters.read_adapter(folder).tensors
    save_file(tensors, folder / adapters.WEIGHTS)
    assert "PEFT saved" in describe(folder).kind
    config = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps(config | {"use_qalora": True}))
    assert "use_qalora" in describe(folder).needs
    save_file(tensors, tmp_path / "alone.safetensors")
    assert "somebody else" in describe(tmp_path / "alone.safetensors").kind


def test_bases_whole_models_and_training_checkpoints(tmp_path):
    save_model(DATA.pi0(), tmp_path / "model.safetensors")
    assert describe(tmp_path).kind.startswith("base checkpoint")
    model = pi0(seed=0)
    save_model(model, tmp_path / "whole.safetensors")
    whole = describe(tmp_path / "whole.safetensors")
    assert whole.kind.startswith("whole")
    assert len(whole.deltas) == len(lora_layers(model))
    training.save_adapters_only(model)
    save_model(model, tmp_path / "trained.safetensors")
    assert describe(tmp_path / "trained.safetensors").kind.startswith("training")


def test_other_files(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "other model" in describe(tmp_path / "other.safetensors").kind
    save_file({"unet.lora_down.weight": torch.zeros(2)}, tmp_path / "theirs.safetensors")
    assert "somebody else" in describe(tmp_path / "theirs.safetensors").kind
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 5)
    for name in ("cut.safetensors", "nowhere"):
        with pytest.raises(CheckpointError):
            describe(tmp_path / name)


def test_a_jax_checkpoint():
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    found = describe(GOLDEN / "jax_lora_pi0_checkpoint")
    assert found.kind == "JAX checkpoint of openpi, with LoRA"
    assert found.facts["ranks"] == "2, 4"


def test_the_command(tmp_path, capsys):
    adapters.save_adapter(pi0(seed=0), tmp_path / "adapter")
    assert command.main([str(tmp_path / "adapter")]) == 0
    printed = capsys.readouterr().out
    assert "needs: the base with this fingerprint" in printed
    assert "q_proj" in printed
    assert command.main([str(tmp_path / "nowhere")]) == 1


def test_the_picture(tmp_path, capsys):
    adapters.save_adapter(pi0(seed=0), tmp_path / "adapter")
    wanted = 0 if importlib.util.find_spec("matplotlib") else 1
    assert command.main([str(tmp_path / "adapter"), "--plot", str(tmp_path / "norms.png")]) == wanted
    assert (tmp_path / "norms.png").exists() == (wanted == 0)
    assert ("matplotlib" in capsys.readouterr().err) == (wanted == 1)
