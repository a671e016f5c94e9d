"""Several adapters on one base, switched between requests."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from openpi_lora_patch import settings as settings_module
from openpi_lora_patch.checkpoint import adapters
from openpi_lora_patch.checkpoint.switch import Switcher
from openpi_lora_patch.errors import CheckpointError, SettingsError
from openpi_lora_patch.patches import openpi_policy
from test_adapters import assert_equal, bits, loss, pi0


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


def test_concurrent_requests_to_a_policy_keep_their_own_adapter(saved):
    folders, losses = saved

    class Policy:
        def __init__(self, model):
            self._model, self._is_pytorch_model = model, True

        def infer(self, obs):
            assert "adapter" not in obs
            return loss(self._model)

    module = SimpleNamespace(Policy=Policy)
    text = ",".join(f"{name}={folder}" for name, folder in folders.items())
    wrong = []
    with contextlib.ExitStack() as undo:
        openpi_policy.patch(module, settings_module.read({"OPENPI_LORA_ADAPTERS": text}), undo)
        policy = Policy(pi0())

        def ask(name):
            for _ in range(4):
                request = {"x": 1} | ({"adapter": name} if name else {})
                if not torch.equal(policy.infer(request), losses[name]):
                    wrong.append(name)

        threads = [threading.Thread(target=ask, args=(name,)) for name in (None, "pick", "place") * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(CheckpointError, match="no adapter"):
            policy.infer({"adapter": "push"})
    assert not wrong
    assert Policy.infer.__qualname__.endswith("Policy.infer")


def test_the_setting_is_names_and_folders():
    assert settings_module.read({"OPENPI_LORA_ADAPTERS": "a=/x,b=/y"}).adapters == (("a", "/x"), ("b", "/y"))
    with pytest.raises(SettingsError, match="OPENPI_LORA_ADAPTERS"):
        settings_module.read({"OPENPI_LORA_ADAPTERS": "/x"})
