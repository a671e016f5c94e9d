"""An optimizer's state outlives a file bit for bit, and no file that is loaded runs code."""

import contextlib
import sys
import types
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from openpi_lora_patch.checkpoint import optimizer
from openpi_lora_patch.errors import CheckpointError
from openpi_lora_patch.patches import openpi_training
from openpi_lora_patch.settings import Settings


def trained(steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=1e-10)
    step(model, adamw, steps)
    return model, adamw


def step(model, adamw, times):
    for _ in range(times):
        adamw.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        adamw.step()


def test_training_goes_on_as_if_it_had_not_been_interrupted(tmp_path):
    model, adamw = trained(3)
    optimizer.save(adamw.state_dict(), tmp_path / "optimizer.pt")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(model, adamw, 2)

    resumed, fresh = trained(0)
    resumed.load_state_dict(weights)
    fresh.load_state_dict(optimizer.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu")))
    step(resumed, fresh, 2)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    expected, found = adamw.state_dict(), fresh.state_dict()
    assert found["state"].keys() == expected["state"].keys()
    for index, state in expected["state"].items():
        assert all(torch.equal(found["state"][index][name], tensor) for name, tensor in state.items())


class Harmful:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (type(self.mark).touch, (self.mark,))


def test_no_pickle_is_run(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"state": {}, "param_groups": [], "x": Harmful(mark)}, tmp_path / "optimizer.pt")
    torch.save({"global_step": 7, "config": Harmful(mark)}, tmp_path / "metadata.pt")
    with pytest.raises(CheckpointError, match="read safely"):
        optimizer.load(tmp_path / "optimizer.pt", weights_only=False)
    assert optimizer.load(tmp_path / "metadata.pt", weights_only=False) == {}
    assert not mark.exists()
    torch.load(tmp_path / "metadata.pt", weights_only=False)
    assert mark.exists(), "the pickle was harmless"


def test_openpis_own_optimizer_state_loads(tmp_path):
    _, adamw = trained(2)
    torch.save(adamw.state_dict(), tmp_path / "optimizer.pt")
    found = optimizer.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=False)
    assert torch.equal(found["state"][1]["exp_avg"], adamw.state_dict()["state"][1]["exp_avg"])


class Large:
    def __reduce__(self):
        return bytearray, (10**9,)


def test_a_small_file_that_would_take_much_memory_is_refused(tmp_path):
    """torch's own safe reading takes both."""
    path = tmp_path / "optimizer.pt"
    torch.save({"state": {}, "param_groups": [], "x": Large()}, path)
    with pytest.raises(CheckpointError, match="it calls bytearray"):
        optimizer.load(path)
    torch.save({"state": {}, "param_groups": [], "x": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    (tmp_path / "packed").replace(path)
    assert len(torch.load(path)["x"]) == 10**6
    with pytest.raises(CheckpointError, match="unpacks to more"):
        optimizer.load(path)


@pytest.mark.parametrize("name", ["optimizer.pt", "metadata.pt"])
def test_what_is_cut_off_is_an_error(tmp_path, name):
    value = trained(1)[1].state_dict() if name == "optimizer.pt" else {"global_step": 3, "config": {"path": tmp_path}}
    optimizer.save(value, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 2):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cannot be read"):
            optimizer.load(tmp_path / name)


@pytest.mark.parametrize("save", ["adapter", "model"])
def test_openpis_script_alone_is_patched_and_given_back(tmp_path, monkeypatch, save):
    def save_checkpoint(model, optimizer, global_step, config):
        script.torch.save(optimizer, tmp_path / "optimizer.pt")

    def use(config):
        with contextlib.ExitStack() as undo:
            for _ in range(2):
                openpi_training.patch(undo, settings)
            assert torch.save is not optimizer.save
            assert script.torch.nn is torch.nn
            script.save_checkpoint(model, trained(1)[1].state_dict(), 1, config)
            return script.torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=False)

    script = types.ModuleType("__main__")
    script.torch, script.safetensors, script.save_checkpoint = torch, safetensors, save_checkpoint
    before = dict(vars(script))
    monkeypatch.setitem(sys.modules, "__main__", script)
    model, settings = nn.Linear(1, 1), Settings(save=save)
    openpi_training.patch(contextlib.ExitStack(), settings)
    assert vars(script) == before, "no script of openpi's"
    script.train_loop = before["train_loop"] = print
    assert use(types.SimpleNamespace(name="mine"))["param_groups"][0]["lr"] == 0.1
    assert model.openpi_config == "mine"
    assert vars(script) == before
    assert ((tmp_path / "optimizer.pt").read_bytes()[:2] == b"PK") == (save == "model")
