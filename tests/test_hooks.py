"""Hooks on real modules in a temporary folder."""

import importlib
import sys
import threading

import pytest

from openpi_lora_patch import ActivationError, LoRAError, hooks


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `hooked` with the modules `plain`, `failing` and `registering`; every hook is taken back afterwards."""
    folder = tmp_path / "hooked"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "plain.py").write_text("value = 1\n")
    (folder / "failing.py").write_text("import os\nif os.environ.get('HOOKED_FAIL'): raise OSError('first time')\n")
    (folder / "registering.py").write_text(
        "from openpi_lora_patch import hooks\nhooks.on_import(__name__, lambda module: None)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registries = [hooks._hooks, hooks._refused, hooks._virtual]
    before, finders = [dict(registry) for registry in registries], list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    for name in [name for name in sys.modules if name.split(".")[0] == "hooked"]:
        del sys.modules[name]


def _import(name):
    return importlib.import_module(f"hooked.{name}")


def test_a_hook_runs_after_the_module_and_each_time_it_is_loaded_anew(package):
    seen = []
    hooks.on_import("hooked.plain", lambda module: seen.append(module.value))
    _import("plain")
    _import("plain")
    assert seen == [1]
    del sys.modules["hooked.plain"]
    _import("plain")
    assert seen == [1, 1]


def test_a_loaded_module_is_hooked_at_once(package):
    module = _import("plain")
    seen = []
    hooks.on_import("hooked.plain", seen.append)
    assert seen == [module]


@pytest.mark.parametrize("raised", [LoRAError("no"), ValueError("no")])
def test_an_error_in_a_hook_refuses_the_module_every_time(package, raised):
    def refuse(module):
        raise raised

    hooks.on_import("hooked.plain", refuse)
    for _ in range(3):
        with pytest.raises((LoRAError, ActivationError), match="no") as caught:
            _import("plain")
        # What lazy imports swallow.
        assert not isinstance(caught.value, ImportError | RuntimeError | AttributeError)
        assert "hooked.plain" not in sys.modules
    assert set(hooks.refused()) == {"hooked.plain"}


def test_a_module_that_failed_once_is_hooked_when_it_loads(package, monkeypatch):
    seen = []
    hooks.on_import("hooked.failing", seen.append)
    monkeypatch.setenv("HOOKED_FAIL", "1")
    with pytest.raises(OSError, match="first time"):
        _import("failing")
    assert seen == []
    monkeypatch.delenv("HOOKED_FAIL")
    assert seen == [_import("failing")]


def test_registering_from_inside_the_import_is_refused(package):
    with pytest.raises(ActivationError, match=r"hooked\.registering is being imported"):
        _import("registering")


def test_a_provided_module_is_importable_in_every_way_and_gone_after_remove(package):
    hooks.provide("hooked.virtual", lambda module: setattr(module, "answer", 42))
    import hooked
    from hooked import virtual

    assert hooked.virtual is virtual is importlib.import_module("hooked.virtual")
    assert virtual.answer == 42
    hooks.remove()
    assert not hasattr(hooked, "virtual")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hooked.virtual")


def test_remove_leaves_nothing_behind(package):
    hooks.on_import("hooked.plain", lambda module: setattr(module, "value", 2))
    hooks.remove()
    assert _import("plain").value == 1
    assert hooks.finder not in sys.meta_path


def test_threads_importing_at_once_run_the_hook_once(package):
    seen, start = [], threading.Barrier(8)
    hooks.on_import("hooked.plain", seen.append)

    def load():
        start.wait()
        _import("plain")

    threads = [threading.Thread(target=load, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert len(seen) == 1
