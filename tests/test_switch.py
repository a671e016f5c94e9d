"""Several adapters on one base, switched between requests."""

import concurrent.futures
import contextlib
import gc
import itertools
import random
import time
from types import SimpleNamespace

import pytest
import torch

from openpi_lora_patch import settings as settings_module
from openpi_lora_patch.checkpoint import adapters
from openpi_lora_patch.checkpoint.switch import Switcher
from openpi_lora_patch.errors import CheckpointError, SettingsError
from openpi_lora_patch.lora import lora_layers
from openpi_lora_patch.patches import openpi_policy
from test_adapters import DATA, assert_equal, bits, loss, pi0


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of two adapters, and the loss that a model with each has."""
    folders, losses = {}, {None: loss(pi0())}
    for seed, (name, preset) in enumerate({"pick": "default", "place": "adapters"}.items()):
        model = pi0(preset, seed=seed)
        folders[name] = tmp_path_factory.mktemp("switch") / name
        adapters.save_adapter(model, folders[name])
        losses[name] = loss(model)
    return folders, losses


def test_each_name_is_the_model_that_was_saved_and_nothing_leaks(saved):
    folders, losses = saved
    model = pi0()
    before = bits(model)
    switcher = Switcher(model, folders)
    assert switcher.names == ["pick", "place"]
    for name in ("pick", "place", None, "place", "pick", "pick", None):
        with switcher.using(name):
            assert torch.equal(loss(model), losses[name])
    assert_equal(bits(model), before)


def test_an_unknown_name_is_an_error_for_that_request_alone(saved):
    folders, losses = saved
    model = pi0()
    switcher = Switcher(model, folders)
    with switcher.using("pick"):
        pass
    with pytest.raises(CheckpointError, match=r"'push'[^$]*pick, place"), switcher.using("push"):
        pass
    with switcher.using("pick"):
        assert torch.equal(loss(model), losses["pick"])


def test_an_adapter_that_does_not_fit_is_refused_at_the_start(saved):
    model = pi0(rank=8)
    before = bits(model)
    with pytest.raises(CheckpointError, match="rank"):
        Switcher(model, saved[0])
    assert_equal(bits(model), before)


def test_a_block_within_another_is_refused_and_harms_neither(saved):
    folders, losses = saved
    model = pi0()
    switcher = Switcher(model, folders)
    with switcher.using("pick"):
        with pytest.raises(CheckpointError, match="in force here already"), switcher.using("place"):
            pass
        assert torch.equal(loss(model), losses["pick"])
    with switcher.using("place"):
        assert torch.equal(loss(model), losses["place"])


def test_a_model_without_adapters_or_with_a_merged_one_is_refused(saved):
    folders, _ = saved
    with pytest.raises(CheckpointError, match="no adapters to switch"):
        Switcher(DATA.pi0(), folders)
    model = pi0()
    layer = next(iter(lora_layers(model).values()))
    layer.merge()
    for load in (lambda: Switcher(model, folders), lambda: adapters.load_adapter(model, folders["pick"])):
        with pytest.raises(CheckpointError, match=r"unmerge\(\)"):
            load()


def test_without_the_setting_a_server_of_adapters_refuses_every_name_and_others_keep_the_field():
    class Policy:
        def __init__(self, model):
            self._model, self._is_pytorch_model = model, True

        def infer(self, obs):
            return obs

    module = SimpleNamespace(Policy=Policy)
    with contextlib.ExitStack() as undo:
        openpi_policy.patch(module, settings_module.read({}), undo)
        with pytest.raises(CheckpointError, match="no adapter of this name"):
            Policy(pi0()).infer({"adapter": "pick"})
        assert Policy(pi0()).infer({"x": 1}) == {"x": 1}
        assert Policy(DATA.pi0()).infer({"adapter": "theirs"}) == {"adapter": "theirs"}


def test_a_switch_that_fails_midway_is_not_taken_for_done(saved, monkeypatch):
    folders, losses = saved
    model = pi0()
    switcher = Switcher(model, folders)
    copy = torch._foreach_copy_

    def half(targets, values):
        copy(targets[: len(targets) // 2], values[: len(values) // 2])
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_copy_", half)
        with pytest.raises(RuntimeError, match="out of memory"), switcher.using("pick"):
            pass
    with switcher.using(None):
        assert torch.equal(loss(model), losses[None])


def test_hundreds_of_switches_leave_no_tensor_behind(saved):
    model = pi0()
    switcher = Switcher(model, saved[0])

    def held():
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
        return len(tensors), {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    def switch(times):
        for _, name in zip(range(times), itertools.cycle([*saved[0], None]), strict=False):
            with switcher.using(name):
                pass

    switch(3)
    before = held()
    switch(300)
    assert held() == before


def test_concurrent_requests_to_a_policy_keep_their_own_adapter(saved):
    folders, losses = saved

    def values(model):
        return sum(parameter.double().sum().item() for parameter in model.parameters() if parameter.requires_grad)

    class Policy:
        def __init__(self, model):
            self._model, self._is_pytorch_model = model, True

        def infer(self, obs):
            assert "adapter" not in obs
            if "loss" in obs:
                return loss(self._model)
            before = values(self._model)
            time.sleep(0.0002)
            assert values(self._model) == before, "switched within a request"
            return before

    module = SimpleNamespace(Policy=Policy)
    text = ",".join(f"{name}={folder}" for name, folder in folders.items())
    with contextlib.ExitStack() as undo:
        openpi_policy.patch(module, settings_module.read({"OPENPI_LORA_ADAPTERS": text}), undo)
        policy = Policy(pi0())
        expected = {name: policy.infer({"adapter": name}) for name in (*folders, None)}
        assert len(set(expected.values())) == 3

        def ask(seed):
            for name in random.Random(seed).choices([*expected, "push"], k=40):
                if name == "push":
                    with pytest.raises(CheckpointError, match="no adapter"):
                        policy.infer({"adapter": name})
                else:
                    assert policy.infer({"x": 1} | ({"adapter": name} if name else {})) == expected[name]

        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            list(pool.map(ask, range(12)))
        for name in expected:
            assert torch.equal(policy.infer({"adapter": name, "loss": True}), losses[name])
    assert Policy.infer.__qualname__.endswith("Policy.infer")


def test_the_setting_is_names_and_folders():
    assert settings_module.read({"OPENPI_LORA_ADAPTERS": "a=/x,b=/y"}).adapters == (("a", "/x"), ("b", "/y"))
    with pytest.raises(SettingsError, match="OPENPI_LORA_ADAPTERS"):
        settings_module.read({"OPENPI_LORA_ADAPTERS": "/x"})
