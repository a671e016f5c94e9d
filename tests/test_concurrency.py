"""Threads that import, activate and deactivate at once, on generated modules with a patch of one line."""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import random
import sys
import threading
import types

import pytest

import openpi_lora_patch
from openpi_lora_patch import ActivationError, activation, hooks
from openpi_lora_patch.replace import replace

MODULES, THREADS = 1000, 16
PATCH = "openpi_lora_patch.patches.doubling"


def _double(module, settings, undo):
    replace(undo, module, "value", 2 * module.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `loaded` with the modules of `names`, each with `value = 1`, which activating doubles."""
    folder = tmp_path / "loaded"
    folder.mkdir()
    (folder / "__init__.py").touch()
    names = [f"loaded.m{index}" for index in range(MODULES)]
    for name in names:
        (tmp_path / f"{name.replace('.', '/')}.py").write_text("value = 1\n")
    openpi_lora_patch.deactivate()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, PATCH, types.SimpleNamespace(patch=_double))
    monkeypatch.setattr(activation, "PATCHES", dict.fromkeys(names, PATCH.rpartition(".")[2]))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield names
    sys.setswitchinterval(interval)
    openpi_lora_patch.deactivate()
    _forget()
    monkeypatch.undo()
    openpi_lora_patch.activate()


def _forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "loaded"]:
        del sys.modules[name]


def _run(*functions):
    """Each in a thread of its own, started together; their errors, or a failure where one does not end."""
    start, errors = threading.Barrier(len(functions)), []

    def guarded(function):
        start.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    return errors


def _importing(names, seed):
    def load():
        for name in random.Random(seed).sample(names, len(names)):
            importlib.import_module(name)

    return load


@contextlib.contextmanager
def _searching(name, find):
    """Call `find()` where `name` is searched for; it returns a spec, or None for the finders after it."""
    finder = types.SimpleNamespace(find_spec=lambda asked, *_: find() if asked == name else None)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path = [other for other in sys.meta_path if other is not finder]


def _values(names):
    return {sys.modules[name].value for name in names}


@pytest.mark.parametrize("seed", range(4))
def test_activating_under_load_patches_every_module_once_or_says_why_not(package, seed):
    refusals = []

    def activate():
        while True:
            try:
                return openpi_lora_patch.activate()
            except ActivationError as error:
                refusals.append(str(error))
                assert not hooks._hooks

    assert _run(activate, *(_importing(package, seed + thread / THREADS) for thread in range(THREADS))) == []
    assert _values(package) == {2}
    assert set(openpi_lora_patch.status().modules.values()) == {"patched"}
    assert all("is being imported at this moment" in text for text in refusals)
    openpi_lora_patch.deactivate()
    assert _values(package) == {1}


def test_deactivating_under_load_leaves_nothing_patched(package):
    def switch():
        for _ in range(20):
            try:
                openpi_lora_patch.activate()
            except ActivationError:
                continue
            openpi_lora_patch.deactivate()

    assert _run(switch, switch, *(_importing(package, thread) for thread in range(THREADS))) == []
    assert _values(package) == {1}
    assert not hooks._hooks
    assert not hooks._refused
    assert hooks.finder not in sys.meta_path


@pytest.mark.parametrize("fails", [False, True])
def test_deactivating_while_a_thread_is_about_to_patch_leaves_its_module_alone(package, monkeypatch, fails):
    """That thread is held where it imports the patch."""
    reached, go = threading.Event(), threading.Event()

    def hold():
        reached.set()
        assert go.wait(timeout=30)
        if fails:
            raise openpi_lora_patch.CompatibilityError("too old")
        return importlib.machinery.ModuleSpec(
            PATCH, hooks._VirtualLoader(lambda module: setattr(module, "patch", _double))
        )

    def deactivate():
        assert reached.wait(timeout=30)
        openpi_lora_patch.deactivate()
        go.set()

    monkeypatch.delitem(sys.modules, PATCH)
    openpi_lora_patch.activate()
    with _searching(PATCH, hold):
        errors = _run(deactivate, lambda: importlib.import_module(package[0]))
    assert [type(error) for error in errors] == [openpi_lora_patch.CompatibilityError] * fails
    assert importlib.import_module(package[0]).value == 1
    assert not hooks.refused()


def test_a_package_and_its_hooked_module_imported_at_once_do_not_lock_each_other_out(tmp_path, package):
    """The package imports the module while another thread, which asked for the module first, searches for it."""
    inside, go = threading.Event(), threading.Event()
    sys.modules["loaded.gate"] = types.SimpleNamespace(inside=inside, go=go)
    (tmp_path / "loaded/sub").mkdir()
    (tmp_path / "loaded/sub/__init__.py").write_text(
        "import sys\ngate = sys.modules['loaded.gate']\ngate.inside.set()\ngate.go.wait(30)\nfrom . import leaf\n"
    )
    (tmp_path / "loaded/sub/leaf.py").write_text("value = 1\n")
    seen = []
    hooks.on_import("loaded.sub.leaf", seen.append)

    def leaf():
        assert inside.wait(timeout=30)
        importlib.import_module("loaded.sub.leaf")

    with _searching("loaded.sub.leaf", go.set):
        assert _run(lambda: importlib.import_module("loaded.sub"), leaf) == []
    assert [module.__name__ for module in seen] == ["loaded.sub.leaf"]


def test_looking_for_a_module_while_it_is_imported_does_not_keep_it_from_being_patched(package):
    def look():
        for name in package:
            importlib.util.find_spec(name)

    openpi_lora_patch.activate()
    assert _run(*[look] * 4, *(_importing(package, thread) for thread in range(4))) == []
    assert _values(package) == {2}


def test_activation_while_another_thread_imports_is_refused(package):
    """That thread has asked for the module before there was a hook."""
    searched, go = threading.Event(), threading.Event()

    def hold():
        searched.set()
        assert go.wait(timeout=30)

    def activate():
        assert searched.wait(timeout=30)
        try:
            openpi_lora_patch.activate()
        finally:
            go.set()

    with _searching(package[0], hold):
        (error,) = _run(activate, lambda: importlib.import_module(package[0]))
    assert isinstance(error, ActivationError)
    assert f"{package[0]} is being imported at this moment" in str(error)
    assert not openpi_lora_patch.status().active
    assert importlib.import_module(package[0]).value == 1
