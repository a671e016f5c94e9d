"""From PyTorch to JAX and back, through files."""

import shutil

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file, save_model

import jax_reference as reference
from golden import GOLDEN
from openpi_lora_patch import convert
from openpi_lora_patch.checkpoint import adapters, jax, orbax
from openpi_lora_patch.checkpoint.jax_export import export
from openpi_lora_patch.errors import CheckpointError, OpenpiLoraError
from openpi_lora_patch.lora import lora_layers
from test_bad_input import damaged, many
from test_jax_training import base_state, lora_model, part, with_params

pytest.importorskip("tensorstore", reason="tensorstore is not installed")

ALPHA = tuple(float(reference.LORA[tower]["attn"][1]) for tower in ("paligemma", "expert"))
HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


def jax_params(kind):
    return part(load_file(GOLDEN / f"jax_training_{kind}.safetensors"), "params/")


@pytest.fixture(params=["pi0", "pi05"])
def saved(request, tmp_path):
    """JAX's parameters, and the same as a base and an adapter of ours."""
    return write(request.param, tmp_path), tmp_path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of the second alone, for pi0."""
    folder = tmp_path_factory.mktemp("files")
    write("pi0", folder)
    return folder


def write(kind, folder):
    params = jax_params(kind)
    model = with_params(lora_model(kind == "pi05"), params)
    save_base(model, folder / "base")
    adapters.save_adapter(model, folder / "adapter")
    save_model(model, str(folder / "whole.safetensors"))
    return params


def save_base(model, folder):
    folder.mkdir()
    plain = {name.replace(".base_layer.", "."): t for name, t in model.state_dict().items() if ".lora_" not in name}
    plain.pop("paligemma_with_expert.paligemma.lm_head.weight")
    save_file(plain, folder / "model.safetensors")


def read(folder):
    source = orbax.JaxCheckpoint(folder)
    return {name: source.read(name) for name in source.shapes}


def assert_params(found, params):
    assert found.keys() == params.keys()
    for name, wanted in params.items():
        # What JAX has of o_proj's Bs is their sum.
        summed = "attn_vec_einsum" in name and name.endswith("lora_b")
        a, b = (found[name].sum(1), wanted.sum(1)) if summed else (found[name], wanted)
        assert torch.equal(a, b), name


def test_what_came_from_jax_goes_back_bit_for_bit(saved):
    params, folder = saved
    export(folder / "adapter", folder / "a", base=folder / "base", alpha=ALPHA, vision_heads=2)
    assert_params(read(folder / "a"), params)
    export(folder / "whole.safetensors", folder / "w", alpha=ALPHA, vision_heads=2)
    assert_params(read(folder / "w"), params)
    export(folder / "base", folder / "b", vision_heads=2)
    assert_params(read(folder / "b"), {name: tensor for name, tensor in params.items() if "lora_" not in name})
    # Siglip, projector and heads too have the bits that they had.
    jax.convert(folder / "b", folder / "again", merged=torch.float32)
    assert_same_tensors(load_file(folder / "again" / "model.safetensors"), base_state(params))


def assert_same_tensors(found, wanted):
    assert found.keys() - {HEAD} == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_any_adapter_of_ours_is_the_same_change_in_jax(tmp_path_factory, data):
    """PEFT's parametrisation, of any ranks and scalings."""
    folder, draw = tmp_path_factory.mktemp("any"), data.draw
    sizes = st.tuples(st.integers(1, 9), st.floats(0.1, 20))
    with pytest.MonkeyPatch.context() as patched:
        for tower in reference.LORA:
            patched.setitem(reference.LORA, tower, {kind: draw(sizes) for kind in ("attn", "ffn")})
        model = lora_model(False, heads=None)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B)
    save_base(model, folder / "base")
    adapters.save_adapter(model, folder / "adapter")
    alpha, rslora = draw(st.none() | st.tuples(*[st.floats(0.5, 32)] * 2)), draw(st.booleans())
    export(folder / "adapter", folder / "jax", base=folder / "base", alpha=alpha, rslora=rslora, vision_heads=2)
    jax.convert(folder / "jax", folder / "back", alpha=alpha, rslora=rslora)
    back = adapters.read_adapter(folder / "back")
    for name, layer in lora_layers(model).items():
        A, B = back.matrices(name)
        torch.testing.assert_close(back.lora[name].scaling * B @ A, layer.delta_weight(), rtol=1e-5, atol=1e-6)


def test_a_jax_parametrised_model_takes_what_jax_trained(saved):
    params, folder = saved
    export(folder / "adapter", folder / "jax", base=folder / "base", alpha=ALPHA, vision_heads=2)
    jax.convert(folder / "jax", folder / "imported", alpha=ALPHA)
    model = with_params(lora_model("state_proj/bias" not in params), params)
    wanted = {name: (layer.lora_A.clone(), layer.lora_B.clone()) for name, layer in lora_layers(model).items()}
    for layer in lora_layers(model).values():
        layer.reset_parameters()
    adapters.load_adapter(model, folder / "imported")
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.lora_A, wanted[name][0])
        assert torch.equal(layer.lora_B, wanted[name][1])
    plain = lora_model("state_proj/bias" not in params, heads=None)
    with pytest.raises(CheckpointError, match="OPENPI_LORA_PARAMETRISATION=jax"):
        adapters.load_adapter(plain, folder / "imported", check_base=False)


def change(folder, **tensors):
    file = folder / "adapter" / adapters.WEIGHTS
    held = adapters.read_adapter(folder / "adapter")
    for end, value in tensors.items():
        name = next(name for name in sorted(held.tensors) if end in name)
        held.tensors[name] = value(held.tensors[name])
        if held.tensors[name] is None:
            del held.tensors[name]
    file.unlink()
    shutil.rmtree(folder / "adapter")
    adapters.write_adapter(held, folder / "adapter")


@pytest.mark.parametrize(
    ("end", "value", "message"),
    [
        ("q_proj.lora_B", torch.ones_like, "block-diagonal"),
        ("q_proj.lora_B", lambda t: t[:8], "base's names and shapes"),
        ("q_proj.lora_B", lambda t: t * float("nan"), "not finite"),
        ("q_proj.lora_B", lambda t: None, "lacks a matrix"),
        ("action_in_proj", lambda t: t[:2], "base's names and shapes"),
    ],
)
def test_what_jax_cannot_have_is_an_error_and_leaves_nothing(saved, end, value, message):
    _, folder = saved
    change(folder, **{end: value})
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match=message):
        export(folder / "adapter", folder / "out", base=folder / "base", vision_heads=2)
    assert sorted(folder.iterdir()) == before


def test_other_bases_and_layouts_are_errors(saved):
    _, folder = saved
    tensors = load_file(folder / "base" / "model.safetensors")

    def write(name, **changes):
        (folder / name).mkdir()
        changed = {key: t for key, t in (tensors | changes).items() if t is not None}
        save_file(changed, folder / name / "model.safetensors")
        return folder / name

    q = "paligemma_with_expert.gemma_expert.model.layers.1.self_attn.q_proj.weight"
    cases = [
        (folder / "adapter", None, "--base"),
        (folder / "adapter", write("other", **{q: tensors[q] + 1}), "another base"),
        (write("less", **{q: None}), None, f"{q} missing"),
        (write("more", extra=torch.ones(1)), None, "extra, which JAX does not have"),
        (write("wide", **{q: torch.ones(64, 17)}), None, r"\(64, 17\)"),
        (write("flat", **{q.replace("1", "0", 1): torch.ones(3)}), None, "cannot be written for JAX"),
        (folder / "nowhere", None, "cannot be read"),
    ]
    cut = write("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    cases.append((folder / "cut", None, "cannot be read"))
    before = sorted(folder.iterdir())
    for source, base, message in cases:
        with pytest.raises(CheckpointError, match=message):
            export(source, folder / "out", base=base, vision_heads=2)
    assert sorted(folder.iterdir()) == before


SOURCES = {"adapter": "base", "whole.safetensors": None, "base": None}  # Each with the base that it needs.
WRITTEN = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "base/model.safetensors"]


@many(30)
@given(data=st.data())
def test_what_is_damaged_is_written_for_jax_whole_or_not_at_all(files, tmp_path, data):
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    shutil.copytree(files, tmp_path / "in")
    hurt = tmp_path / "in" / data.draw(st.sampled_from([*WRITTEN, "whole.safetensors"]))
    content = hurt.read_bytes()
    if data.draw(st.booleans()):  # Where the names and the shapes are.
        end = min(len(content), 8 + int.from_bytes(content[:8], "little"))
        content = damaged(content[:end], data) + content[end:]
    else:
        content = damaged(content, data)
    hurt.write_bytes(content)
    source, base = data.draw(st.sampled_from(sorted(SOURCES.items())))
    try:
        export(tmp_path / "in" / source, tmp_path / "out", base=base and tmp_path / "in" / base, vision_heads=2)
    except OpenpiLoraError:
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
    else:
        assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
        assert read(tmp_path / "out")


def test_no_space_and_no_permission(saved, monkeypatch):
    _, folder = saved
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
        with pytest.raises(CheckpointError, match="1,000 bytes free"):
            export(folder / "base", folder / "out", vision_heads=2)
    (folder / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be made"):
        export(folder / "base", folder / "file" / "out", vision_heads=2)
    with pytest.raises(CheckpointError, match="there already"):
        export(folder / "base", folder / "adapter", vision_heads=2)
    assert not (folder / "out").exists()


def test_the_command(saved, capsys, monkeypatch):
    params, folder = saved
    monkeypatch.setattr(convert.jax_export.export, "__kwdefaults__", export.__kwdefaults__ | {"vision_heads": 2})
    (folder / "adapter" / "assets" / "libero").mkdir(parents=True)
    (folder / "adapter" / "assets" / "libero" / "norm_stats.json").write_text("{}")
    arguments = [str(folder / "adapter"), "--base", str(folder / "base"), "--out", str(folder / "out")]
    alpha = [str(value) for value in ALPHA]
    assert convert.main(["to-jax", *arguments, "--alpha", *alpha]) == 0
    assert_params(read(folder / "out"), params)
    assert (folder / "out" / "assets" / "libero" / "norm_stats.json").exists()
    assert "converting" in capsys.readouterr().err
    assert convert.main(["to-jax", *arguments]) == 1
    assert "there already" in capsys.readouterr().err
    assert (folder / "out").stat().st_mode & 0o777 == 0o755
