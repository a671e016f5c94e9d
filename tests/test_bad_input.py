"""Bad input: whatever is read is taken whole or refused with our error; never in part, and no code in it is run."""

import contextlib
import json
import math
import os
import pickle
import shutil
import struct
import sys
import types
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from golden import GOLDEN
from openpi_lora_patch import compat, convert, settings
from openpi_lora_patch import inspect as inspect_command
from openpi_lora_patch.checkpoint import adapters, layout, merge, optimizer, training
from openpi_lora_patch.checkpoint.switch import Switcher
from openpi_lora_patch.errors import CheckpointError, CompatibilityError, OpenpiLoraError, SettingsError
from openpi_lora_patch.lora import LoRAConfig, inject, lora_layers

NAMES = ("one.q_proj", "one.k_proj", "two.up_proj")


def plain():
    torch.manual_seed(0)
    one = nn.ModuleDict({"q_proj": nn.Linear(6, 5), "k_proj": nn.Linear(6, 5)})
    two = nn.ModuleDict({"up_proj": nn.Linear(6, 5)})
    return nn.ModuleDict({"one": one, "two": two, "head": nn.Linear(5, 3)}).requires_grad_(False)


def adapted(seed=None, dora=False):
    """A model with every hook that openpi's has, where `OPENPI_LORA_SAVE=adapter`."""
    model = plain()
    attention, ffn = LoRAConfig(2, 4.0, use_dora=dora), LoRAConfig(3, 3.0, use_dora=dora)
    inject(model, {"q_proj": attention, "k_proj": attention, "up_proj": ffn})
    model["head"].requires_grad_(True)
    layout.accept_base_checkpoints(model)
    training.load_adapters_through(model)
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(parameter, std=0.1)
    return model


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def loads(model, load):
    """Whether `load` succeeds; if it is refused, nothing of the model has changed, and no other error is raised."""
    before = bits(model)
    try:
        load()
    except OpenpiLoraError:
        after = bits(model)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        return False
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert all(math.isfinite(layer.scaling) for layer in lora_layers(model).values())
    return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One of each kind of file."""
    folder = tmp_path_factory.mktemp("good")
    model = adapted(seed=1)
    adapters.save_adapter(model, folder / "adapter")
    adapters.save_adapter(adapted(seed=2, dora=True), folder / "dora")
    safetensors.torch.save_file(plain().state_dict(), folder / "base.safetensors")
    safetensors.torch.save_file(model.state_dict(), folder / "whole.safetensors")
    training.save_adapters_only(model)
    (folder / "training").mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / "training" / "model.safetensors")
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    sum(parameter.sum() for parameter in model.parameters()).backward()
    adamw.step()
    optimizer.save(adamw.state_dict(), folder / "training" / "optimizer.pt")
    optimizer.save({"global_step": 3, "config": {"name": "mine"}}, folder / "training" / "metadata.pt")
    return folder


FILES = [
    "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "base.safetensors", "whole.safetensors",
    "training/model.safetensors", "training/optimizer.pt", "training/metadata.pt",
    "dora/adapter_model.safetensors", "dora/adapter_config.json",
]  # fmt: skip


def read_everything(folder, scratch):
    """Hand the files in `folder` to whatever reads them."""
    for model in (plain(), adapted(), adapted(dora=True)):
        for source in ("adapter", "dora", "training"):
            loads(model, lambda model=model, source=source: adapters.load_adapter(model, folder / source))
    model = adapted()
    loads(model, lambda: Switcher(model, {"a": folder / "adapter"}))
    # openpi reads these with safetensors itself, and only what it read is handed to us.
    with contextlib.suppress(safetensors.SafetensorError, FileNotFoundError):
        tensors = safetensors.torch.load_file(folder / "training" / "model.safetensors")
        model = adapted()
        if adapters.METADATA in tensors:
            loads(model, lambda: model.load_state_dict(tensors))
    for source in ("adapter", "dora", "base.safetensors", "whole.safetensors", "training"):
        assert inspect_command.main([str(folder / source)]) in (0, 1)
    for name in ("optimizer.pt", "metadata.pt"):
        with contextlib.suppress(CheckpointError):
            assert isinstance(optimizer.load(folder / "training" / name), dict)
    out = scratch / "merged"
    for source in ("adapter", "dora"):
        with contextlib.suppress(CheckpointError):
            merge.merge(folder / "base.safetensors", folder / source, out)
        assert {path.name for path in scratch.iterdir()} <= {"merged"}, "half a merge was left"
        shutil.rmtree(out, ignore_errors=True)
    assert convert.main(["training", str(folder / "training"), "--out", str(out)]) in (0, 1)
    assert {path.name for path in scratch.iterdir()} <= {"merged"}


@pytest.fixture
def sandbox(saved, tmp_path):
    """The same files to damage, and an empty folder; `reset()` makes them good again."""
    box = types.SimpleNamespace(files=tmp_path / "files", scratch=tmp_path / "scratch")

    def reset():
        for path in (box.files, box.scratch):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(saved, box.files)
        box.scratch.mkdir()

    box.reset = reset
    return box


def many(number):
    """So many examples, 20 times as many with `--long`."""
    number *= 20 if "--long" in sys.argv else 1
    unfit = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return examples(max_examples=number, deadline=None, suppress_health_check=unfit)


def damaged(content, data):
    """`content` cut, with bits flipped, with bytes in between or with another length of its header."""
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(300, len(content) - 1)))
    kind = data.draw(st.sampled_from(["cut", "flip", "insert", "overwrite", "length"]))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << data.draw(st.integers(0, 7))]) + content[place + 1 :]
    if kind == "length":
        length = data.draw(st.sampled_from([0, 1, 2**31, 2**60, 2**63, 2**64 - 1]) | st.integers(0, 2 * len(content)))
        return struct.pack("<Q", length) + content[8:]
    new = data.draw(st.binary(min_size=1, max_size=9))
    return content[:place] + new + content[place + (len(new) if kind == "overwrite" else 0) :]


@many(60)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_taken_whole(sandbox, data):
    sandbox.reset()
    path = sandbox.files / data.draw(st.sampled_from(FILES))
    path.write_bytes(damaged(path.read_bytes(), data))
    read_everything(sandbox.files, sandbox.scratch)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(2**60, 2**70) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["", ".", "q_proj", "one", "(", "../../x", "/etc/passwd", "\0", 10**400, 1e308, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@many(70)
@given(data=st.data())
def test_any_value_in_a_config_is_refused_or_taken_whole(sandbox, data):
    sandbox.reset()
    path = sandbox.files / data.draw(st.sampled_from(["adapter", "dora"])) / adapters.CONFIG
    config = json.loads(path.read_text())
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[name] = data.draw(VALUES)
    path.write_text(json.dumps(data.draw(VALUES) if data.draw(st.integers(0, 9)) == 0 else config))
    read_everything(sandbox.files, sandbox.scratch)


@many(30)
@given(data=st.data())
def test_any_value_in_metadata_is_refused_or_taken_whole(sandbox, data):
    sandbox.reset()
    adapter = adapters.read_adapter(sandbox.files / "adapter")
    metadata = adapter.metadata | {data.draw(st.sampled_from(sorted(adapter.metadata))): data.draw(VALUES)}
    text = json.dumps(data.draw(VALUES | st.just(metadata)))
    text = data.draw(st.just(text) | st.text(max_size=9))
    tensors = adapter.tensors
    path = sandbox.files / "adapter" / adapters.WEIGHTS
    safetensors.torch.save_file(tensors, path, {adapters.METADATA: text})
    header = data.draw(st.just(text) | VALUES.map(json.dumps))
    header = data.draw(st.just(header) | VALUES.map(lambda v: json.dumps({"config": v, "metadata": metadata})))
    header = torch.tensor(list(header.encode(errors="replace")), dtype=torch.uint8)
    forms = [header, header.float(), header.bfloat16(), header.reshape(1, -1), header.to(torch.int64) * 300]
    header = data.draw(st.sampled_from(forms))
    path = sandbox.files / "training" / "model.safetensors"
    safetensors.torch.save_file(tensors | {adapters.METADATA: header}, path)
    for name in (optimizer._GROUPS, "other"):
        path = sandbox.files / "training" / "optimizer.pt"
        key = data.draw(st.sampled_from(["0.step", "0", "a.b", "", "-1.x.y", "0.exp_avg"]))
        safetensors.torch.save_file({key: torch.ones(2)}, path, {name: text})
        read_everything(sandbox.files, sandbox.scratch)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int16, torch.uint8, torch.bool, torch.complex64, torch.uint16,
]  # fmt: skip


@many(70)
@given(data=st.data())
def test_any_tensor_is_refused_or_taken_whole(sandbox, data):
    sandbox.reset()
    path = sandbox.files / data.draw(st.sampled_from([name for name in FILES if name.endswith(".safetensors")]))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["shape", "dtype", "value", "name", "gone"]))
    tensor = tensors.pop(name)
    if kind == "shape":
        shape = data.draw(st.lists(st.integers(0, 7), max_size=4) | st.sampled_from([[0, 2**60], [2**40, 0, 2**20]]))
        tensors[name] = torch.zeros(shape, dtype=tensor.dtype)
    elif kind == "dtype":
        tensors[name] = tensor.to(data.draw(st.sampled_from(DTYPES)))
    elif kind == "value":
        value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e300]))
        tensors[name] = torch.full(tensor.shape, value, dtype=torch.float64)
    elif kind == "name":
        part = data.draw(st.sampled_from(["", "../../x", "/etc/passwd", ".", "..", "lora_A", "x.lora_A.weight", "\0"]))
        tensors[data.draw(st.sampled_from([part, name + part, part + name, name[: len(name) // 2]]))] = tensor
    safetensors.torch.save_file(tensors, path, metadata)
    read_everything(sandbox.files, sandbox.scratch)


def test_a_file_cut_anywhere_is_refused(sandbox, pytestconfig):
    sandbox.reset()
    step = 1 if pytestconfig.option.long else 7
    model, fresh = adapted(), plain()
    for path in (sandbox.files / name for name in FILES if name.startswith("adapter/")):
        content = path.read_bytes()
        end = len(content.rstrip())  # JSON is whole without the last line's end.
        for size in {*range(0, end, step), end - 1, 7, 8, 9}:
            path.write_bytes(content[:size])
            for each in (model, fresh):
                assert not loads(each, lambda each=each: adapters.load_adapter(each, sandbox.files / "adapter"))
        path.write_bytes(content)


class Harmful:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return type(self.mark).touch, (self.mark,)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_is_run_under_any_name(sandbox, tmp_path, name, zipped):
    sandbox.reset()
    mark = tmp_path / "mark"
    for path in (sandbox.files / name, (sandbox.files / name).with_suffix(".bin")):
        torch.save({"state": Harmful(mark)}, path, _use_new_zipfile_serialization=zipped)
        assert zipfile.is_zipfile(path) == zipped
    read_everything(sandbox.files, sandbox.scratch)
    path.with_suffix(".pkl").write_bytes(pickle.dumps(Harmful(mark)))
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the pickle was harmless"


# Lies: (length of the header, shape, end of the data) of a file of some hundred bytes.
LIES = [
    (2**60, [1], 4), (2**64 - 1, [1], 4), (99_000_000, [1], 4), (None, [2**60], 2**62), (None, [2**31, 2**31], 2**63),
    (None, [2**40], 4), (None, [0, 2**60], 0), (None, [2**32, 2**32], 0), (None, [4 * 10**9], 16 * 10**9),
]  # fmt: skip

_MEASURE = """
import pathlib, resource, sys
import test_bad_input
model = test_bad_input.adapted()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
limit = 64 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for folder in map(pathlib.Path, sys.argv[2:]):
    test_bad_input.read_everything(folder, pathlib.Path(sys.argv[1]))
print("KiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_lying_header_takes_no_memory(saved, tmp_path, child):
    folders = []
    for index, (length, shape, end) in enumerate(LIES):
        for name in (name for name in FILES if name.endswith("safetensors") or "optimizer" in name):
            folders.append(tmp_path / f"{index}-{len(folders)}")
            shutil.copytree(saved, folders[-1])
            header = {"0.one.q_proj.lora_A.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
            header = json.dumps(header).encode()
            (folders[-1] / name).write_bytes(struct.pack("<Q", length or len(header)) + header + bytes(4))
    (tmp_path / "scratch").mkdir()
    paths = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    done = child("-c", _MEASURE, str(tmp_path / "scratch"), *map(str, folders), PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.rpartition("KiB")[2]) < 100_000


@given(st.sampled_from(sorted(settings._READERS)), st.text() | VALUES)
def test_any_setting_is_read_or_refused_by_name(name, value):
    for source, options in ((f"OPENPI_LORA_{name.upper()}", {}), (f"activate({name}=...)", {name: value})):
        try:
            found = settings.read({} if options else {source: str(value)}, **options)
        except SettingsError as error:
            assert source in str(error)  # noqa: PT017 (either outcome is right)
        else:
            assert found in {found, settings.Settings()}, "a setting has to be hashable"


@pytest.mark.parametrize("text", ["a", "a=", "=b", "a=b,a=c", "a=b,,c", "=", "a=b,=c"])
def test_adapters_without_name_or_folder_or_named_twice_are_refused(text):
    with pytest.raises(SettingsError, match="OPENPI_LORA_ADAPTERS"):
        settings.read({"OPENPI_LORA_ADAPTERS": text})


def test_adapters_to_choose_from_need_a_model_that_takes_them(saved):
    model = plain()
    assert not loads(model, lambda: Switcher(model, {"a": saved / "adapter"}))


@given(name=VALUES | st.binary() | st.just("a"))
def test_whatever_a_request_names_is_an_adapter_that_is_there_or_refused(saved, name):
    switcher = Switcher(adapted(), {"a": saved / "adapter"})
    try:
        with switcher.using(name):
            assert name in (None, "a")
    except CheckpointError:
        assert name not in (None, "a")


TABLE = compat.TABLE.read_bytes()


@many(50)
@given(data=st.data())
def test_a_damaged_table_of_releases_is_refused(tmp_path, monkeypatch, data):
    (tmp_path / "table.json").write_bytes(damaged(TABLE, data))
    monkeypatch.setattr(compat, "TABLE", tmp_path / "table.json")
    compat.table.cache_clear()
    try:
        compat.tested("4.53.2")
    except CompatibilityError as error:
        assert "table.json" in str(error)  # noqa: PT017 (either outcome is right)
    finally:
        compat.table.cache_clear()


def test_only_the_linear_that_an_adapter_names_gets_it(tmp_path):
    model = nn.ModuleDict({"q": nn.Linear(2, 2), "inner": nn.ModuleDict({"q": nn.Linear(2, 2)})})
    tensors = {f"base_model.model.q.lora_{m}.weight": torch.ones(2, 2) for m in "AB"}
    adapters.write_adapter(
        adapters.Adapter({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors, {}), tmp_path / "a"
    )
    adapters.load_adapter(model, tmp_path / "a")
    assert list(lora_layers(model)) == ["q"]


@many(60)
@given(data=st.data())
def test_a_damaged_jax_checkpoint_is_refused_or_taken_whole(tmp_path, data):
    pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    source, out = tmp_path / "jax", tmp_path / "out"
    for path in (source, out):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(GOLDEN / "jax_lora_pi0_checkpoint", source)
    path = data.draw(st.sampled_from(sorted(path for path in source.rglob("*") if path.is_file())))
    path.write_bytes(damaged(path.read_bytes() or bytes(9), data))
    options = data.draw(st.sampled_from([[], ["--merged", "float32"]]))
    assert inspect_command.main([str(source)]) in (0, 1)
    written = convert.main(["jax", str(source), "--out", str(out), *options]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"jax"} | ({"out"} if written else set())
    if written and not options:
        assert adapters.read_adapter(out).lora


@pytest.mark.parametrize(
    "array", [None, {}, {"shape": 3}, {"shape": [2**62, 2]}, {"shape": []}, {"shape": [2**40, 8, 8]}, {"dtype": "<u9"}]
)
def test_a_jax_array_that_lies_about_itself_is_refused(tmp_path, array):
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    shutil.copytree(GOLDEN / "jax_lora_pi0_checkpoint", tmp_path / "jax")
    spec = {"driver": "ocdbt", "base": f"file://{tmp_path / 'jax' / 'params'}/"}
    store = tensorstore.KvStore.open(spec).result()
    key = next(key for key in store.list().result() if key.endswith(b"q_einsum.lora_a/.zarray"))
    value = array and {**json.loads(store.read(key).result().value), **array}
    store.write(key, json.dumps(value).encode()).result()
    assert inspect_command.main([str(tmp_path / "jax")]) in (0, 1)
    for options in ([], ["--merged", "float32"]):
        assert convert.main(["jax", str(tmp_path / "jax"), "--out", str(tmp_path / "out"), *options]) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["jax"]
