"""Merging: a plain checkpoint with the adapted model's outputs, and honest figures for what rounding costs."""

import contextlib
import itertools
import os
import random
import resource
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model, save_file, save_model

from kills import kill_while_it_writes
from openpi_lora_patch import merge as command
from openpi_lora_patch.checkpoint import actions, adapters, peft
from openpi_lora_patch.checkpoint import merge as merging
from openpi_lora_patch.errors import CheckpointError
from openpi_lora_patch.inspect import main as inspect
from openpi_lora_patch.lora import LoRAConfig, lora_layers
from openpi_lora_patch.reference import FOLDER, Reference, distance
from test_adapters import DATA, loss, pi0


@pytest.fixture
def folders(tmp_path):
    """A plain base, an adapter trained on it, the model they make, and a name for the result."""
    model = pi0(seed=0)
    (tmp_path / "base").mkdir()
    save_model(DATA.pi0(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner.
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


@pytest.mark.parametrize("name", ["pi0_float32", "pi05_float32"])
def test_the_effect_on_actions_is_that_of_sampling_three_models(tmp_path, name):
    data = Reference(FOLDER / f"{name}.safetensors")
    model = pi0(seed=0, data=data)
    save_model(data.pi0(), tmp_path / "base.safetensors")
    adapters.save_adapter(model, tmp_path / "adapter")
    paths = tmp_path / "base.safetensors", tmp_path / "adapter"
    for dtype in (torch.float32, torch.bfloat16):
        merging.merge(*paths, tmp_path / str(dtype), dtype=dtype)
    inputs = actions._inputs(model.config, "cpu", 0)
    expected = model.sample_actions(*inputs)
    rounded = data.pi0()
    load_model(rounded, tmp_path / "torch.bfloat16" / "model.safetensors")
    worst = (rounded.sample_actions(*inputs) - expected).abs().max().item()
    alone = (data.pi0().sample_actions(*inputs) - expected).abs()

    found = actions.effect(*paths, tmp_path / "torch.bfloat16")
    assert found.worst == pytest.approx(worst, rel=0.01)
    assert found.adapter_worst == pytest.approx(alone.max().item(), rel=1e-3)
    assert found.adapter_mean == pytest.approx(alone.mean().item(), rel=1e-3)
    assert 1e-5 < found.mean < found.worst < found.adapter_worst
    assert actions.effect(*paths, tmp_path / "torch.float32").worst == 0.0


def test_the_effect_on_actions_needs_a_pi0(tmp_path, capsys):
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "base.safetensors")
    tensors = {f"base_model.model.a.lora_{m}.weight": torch.ones(4, 4) for m in "AB"}
    adapters.write_adapter(
        adapters.Adapter({"r": 4, "lora_alpha": 4, "peft_type": "LORA"}, tensors, {}), tmp_path / "a"
    )
    arguments = [str(tmp_path / "base.safetensors"), str(tmp_path / "a"), "--out", str(tmp_path / "out"), "--actions"]
    assert command.main(arguments) == 1
    assert "no pi0" in capsys.readouterr().err
    assert load_file(tmp_path / "out" / "model.safetensors")["a.weight"][0, 0] == 5


def test_assets_come_along(folders):
    base, adapter, out, _ = folders
    (adapter / "assets" / "robot").mkdir(parents=True)
    (adapter / "assets" / "robot" / "norm_stats.json").write_text("{}")
    merging.merge(base, adapter, out)
    assert (out / "assets" / "robot" / "norm_stats.json").read_text() == "{}"


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


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def change(folder, edit):
    adapter = adapters.read_adapter(folder)
    name = next(name for name in sorted(adapter.tensors) if "lora_A" in name)
    edit(adapter.tensors, name)
    save_file(adapter.tensors, folder / adapters.WEIGHTS)


DAMAGE = {
    "weights cut in the header": lambda folder: cut(folder / adapters.WEIGHTS, 0.01),
    "weights cut in the data": lambda folder: cut(folder / adapters.WEIGHTS, 0.99),
    "configuration cut": lambda folder: cut(folder / adapters.CONFIG, 0.5),
    "no configuration": lambda folder: (folder / adapters.CONFIG).unlink(),
    "no matrix": lambda folder: change(folder, lambda tensors, name: tensors.pop(name)),
    "wrong rank": lambda folder: change(folder, lambda tensors, name: tensors.update({name: torch.ones(3, 64)})),
    "no matrix at all": lambda folder: change(folder, lambda tensors, name: tensors.update({name: torch.ones(3)})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_an_error_of_each_command(folders, capsys, damage):
    base, adapter, out, _ = folders
    DAMAGE[damage](adapter)
    for main, arguments in ((command.main, [str(base), str(adapter), "--out", str(out)]), (inspect, [str(adapter)])):
        assert main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.err.count("found:") == 1
        assert str(adapter) in printed.err or "layers.0" in printed.err
        assert not printed.out
    assert sorted(p.name for p in out.parent.iterdir()) == ["adapter", "base"]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_ranks_targets_and_dtypes_merge_to_the_float32_sum(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("merge")
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    wanted = data.draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
    plain = {f"{name}.weight": torch.randn(5, 7, generator=draw).to(dtype) for name in "abc"}
    save_file(plain, folder / "base.safetensors")
    ranks = data.draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), min_size=1))
    alphas = {name: data.draw(st.floats(0.5, 64)) for name in ranks}
    rslora = data.draw(st.booleans())
    config = peft.describe({name: LoRAConfig(rank, alphas[name], rslora) for name, rank in ranks.items()}, [])
    matrices = {
        name: (torch.randn(rank, 7, generator=draw), torch.randn(5, rank, generator=draw))
        for name, rank in ranks.items()
    }
    tensors = {
        peft.tensor_name(name, key): matrix
        for name, pair in matrices.items()
        for key, matrix in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    adapters.write_adapter(adapters.Adapter(config, tensors, {}), folder / "adapter")
    report = merging.merge(folder / "base.safetensors", folder / "adapter", folder / "out", dtype=wanted)
    assert report.keys() == ranks.keys()
    for name, found in load_file(folder / "out" / "model.safetensors").items():
        linear, expected = name.removesuffix(".weight"), plain[name].double()
        if linear in ranks:
            A, B = matrices[linear]
            scaling = alphas[linear] / (ranks[linear] ** 0.5 if rslora else ranks[linear])
            expected = expected + scaling * (B.double() @ A.double())
        assert found.dtype == (wanted or dtype)
        torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(found.dtype).eps, atol=1e-4)


WRITERS = {
    "merge": lambda base, adapter, out: merging.merge(base, adapter, out),
    "save": lambda base, adapter, out: adapters.write_adapter(adapters.read_adapter(adapter), out),
    "replace": lambda base, adapter, out: adapters.write_adapter(adapters.read_adapter(adapter), adapter),
}


@pytest.fixture
def contents(folders):
    """What is in the folders at the time of the call, file by file."""
    root = folders[0].parent
    return lambda: {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("writer", WRITERS)
def test_missing_space_is_seen_before_anything_is_written(folders, contents, monkeypatch, writer):
    before = contents()
    usage = merging.files.shutil.disk_usage(folders[0])._replace(free=10)
    monkeypatch.setattr(merging.files.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(adapters, "save_file", lambda *_: pytest.fail("written to a full disk"))
    with pytest.raises(CheckpointError, match="no space"):
        WRITERS[writer](*folders[:3])
    assert contents() == before


def fails_in_child(write, restrict):
    """The message of the error that `write` ends with where `restrict` has run, in a process of its own."""
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        restrict()
        try:
            write()
            message = "no error"
        except CheckpointError as error:
            message = str(error)
        except BaseException as error:
            message = repr(error)
        os.write(start, message.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(start)
    with os.fdopen(end) as pipe:
        return pipe.read()


def small_files_only():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_the_system_cuts_off_leaves_what_was_there(folders, contents, writer):
    before = contents()
    message = fails_in_child(lambda: WRITERS[writer](*folders[:3]), small_files_only)
    assert "could not be written" in message
    assert "File too large" in message
    assert contents() == before


@contextlib.contextmanager
def modes(paths):
    """Each path with a mode of its own, for a while."""
    before = {path: path.stat().st_mode for path in paths}
    for path, mode in paths.items():
        path.chmod(mode)
    yield
    for path, mode in before.items():
        path.chmod(mode)


@pytest.mark.parametrize("writer", WRITERS)
def test_no_permission_is_an_error_that_leaves_what_was_there(folders, contents, writer):
    before = contents()
    base, adapter, out, _ = folders
    root = os.getuid() == 0  # Whom no mode stops, so that somebody else has to try, who has to get there.
    private = [path for path in out.parents if root and path.stat().st_uid == 0 and not path.stat().st_mode & 1]
    with modes(dict.fromkeys(private, 0o755) | {out.parent: 0o555, adapter: 0o555}):
        message = fails_in_child(lambda: WRITERS[writer](base, adapter, out), lambda: root and os.setuid(65534))
    assert "Permission denied" in message
    assert "check space and rights" in message
    assert contents() == before


def test_a_kill_at_any_moment_leaves_whole_files(tmp_path):
    names = [f"l{number}" for number in range(20)]
    save_file({f"{name}.weight": torch.ones(128, 128) for name in names}, tmp_path / "base.safetensors")
    shapes = {"A": (4, 128), "B": (128, 4)}
    tensors = {f"base_model.model.{n}.lora_{m}.weight": torch.ones(shape) for n in names for m, shape in shapes.items()}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    adapters.write_adapter(adapters.Adapter(config, tensors, {}), tmp_path / "adapter")
    (tmp_path / "adapter" / "assets" / "robot").mkdir(parents=True)
    (tmp_path / "adapter" / "assets" / "robot" / "norm_stats.json").write_text("{}" * 9999)
    generator = random.Random(1)
    whole = midway = 0
    for run in range(200):
        folder = tmp_path / str(run)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            for number in itertools.count():
                merging.merge(tmp_path / "base.safetensors", tmp_path / "adapter", folder / str(number))
        kill_while_it_writes(child, folder, generator)
        for path in folder.iterdir():
            if path.name.startswith("."):
                midway += 1
                continue
            whole += 1
            merged = load_file(path / "model.safetensors")
            assert len(merged) == len(names)
            assert all((tensor == 5).all() for tensor in merged.values())
            assert (path / "assets" / "robot" / "norm_stats.json").read_text() == "{}" * 9999
    assert midway > 20, "the kills came too late or too early to show anything"
    assert whole > 5


def test_the_command(folders, capsys):
    base, adapter, out, model = folders
    assert command.main([str(base), str(adapter), "--out", str(out), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in lora_layers(model))
    assert command.main([str(base), str(adapter), "--out", str(out)]) == 1
    assert "there already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["merge", "convert", "inspect"])
def test_help_has_an_example(name):
    done = subprocess.run(
        [sys.executable, "-m", f"openpi_lora_patch.{name}", "--help"], capture_output=True, text=True, check=True
    )
    assert f"python -m openpi_lora_patch.{name} " in done.stdout.split("example")[1]
