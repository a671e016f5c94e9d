"""The quantised base in a file beside its checkpoint: the same bits, and never those of something else."""

import logging
import os

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from openpi_lora_patch.checkpoint import adapters, cache, files
from openpi_lora_patch.checkpoint.streaming import load_model
from openpi_lora_patch.checkpoint.training import save_adapters_only
from openpi_lora_patch.lora import lora_layers, quantized
from openpi_lora_patch.lora.quantized import quantize
from test_bad_input import many
from test_fast import adapted
from test_quantized import FORMATS

NAME = "int8"


@pytest.fixture
def checkpoint(tmp_path):
    write(tmp_path / "model.safetensors", 0)
    return tmp_path / "model.safetensors"


def write(path, added):
    """A base checkpoint whose weights are the small model's and a number more; always of the same size and time."""
    state = adapted("pi0", torch.float32)[0].state_dict()
    state = {name.replace(".base_layer.", "."): t + added for name, t in state.items() if ".lora_" not in name}
    safetensors.torch.save_file({n: t for n, t in state.items() if "embed_tokens" not in n}, path)
    os.utime(path, (0, 0))


def loaded(checkpoint, name=NAME, keep=True):
    model, _ = adapted("pi0", torch.float32)
    quantize(lora_layers(model).values(), name)
    load_model(model, checkpoint, keep=keep)
    return [layer.base_layer for layer in lora_layers(model).values()]


def same(ones, others):
    return all(
        torch.equal(getattr(one, part), getattr(other, part))
        for one, other in zip(ones, others, strict=True)
        for part in ("data", "scale", "source")
    )


def refuse(*_):
    raise AssertionError("quantised again")


@pytest.mark.parametrize("name", FORMATS)
def test_the_second_load_has_the_bits_of_the_first_and_quantises_nothing(name, checkpoint, monkeypatch):
    plain, first = loaded(checkpoint, name, keep=False), loaded(checkpoint, name)
    assert same(plain, first)
    assert checkpoint.with_name(f"model.safetensors.{name}").exists()
    model, _ = adapted("pi0", torch.float32)
    quantize(lora_layers(model).values(), name)
    monkeypatch.setattr(quantized.QuantizedLinear, "_hold", refuse)
    load_model(model, checkpoint, keep=True)
    assert same([layer.base_layer for layer in lora_layers(model).values()], first)


def test_nothing_is_kept_unless_asked_for_nor_of_adapters_alone(checkpoint):
    loaded(checkpoint, keep=False)
    model, _ = adapted("pi0", torch.float32)
    quantize(lora_layers(model).values(), NAME)
    load_model(model, checkpoint)
    save_adapters_only(model)
    safetensors.torch.save_file({"x": torch.ones(1)}, checkpoint.with_name("other.safetensors"))
    load_model(model, checkpoint.with_name("other.safetensors"), strict=False, keep=True)
    assert {path.name for path in checkpoint.parent.iterdir()} == {"model.safetensors", "other.safetensors"}


CHANGES = {
    "another checkpoint": lambda checkpoint, _: write(checkpoint, 1),
    "a later time": lambda checkpoint, _: os.utime(checkpoint, (1, 1)),
    "another version": lambda _, patch: patch.setattr(adapters, "version", lambda: "0"),
    "another torch": lambda _, patch: patch.setattr(torch, "__version__", "2.99.0"),
    "something unknown": lambda checkpoint, _: _spoil(checkpoint),
}


def _spoil(checkpoint):
    cached = checkpoint.with_name(f"model.safetensors.{NAME}")
    with files.reading(cached) as file:
        metadata = file.metadata()
    tensors = {name: tensor + 1 for name, tensor in safetensors.torch.load_file(cached).items()}
    safetensors.torch.save_file(tensors, cached, {name: f"{value}0" for name, value in metadata.items()})


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_made_from_something_else_is_made_anew_and_said(change, checkpoint, monkeypatch, caplog):
    loaded(checkpoint)
    CHANGES[change](checkpoint, monkeypatch)
    with caplog.at_level(logging.INFO, "openpi_lora_patch"):
        assert same(loaded(checkpoint), loaded(checkpoint, keep=False))
    assert "of another checkpoint, model or version, and made anew" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "openpi_lora_patch"):
        loaded(checkpoint)
    assert "is read from" in caplog.text


@many(15)
@given(data=st.data())
def test_a_damaged_one_is_made_anew(data, checkpoint, caplog):
    cached = checkpoint.with_name(f"model.safetensors.{NAME}")
    expected = loaded(checkpoint)
    whole = cached.read_bytes()
    if data.draw(st.booleans()):
        length = data.draw(st.integers(0, len(whole) - 1))
        cached.write_bytes(whole[:length] + data.draw(st.sampled_from([b"", b"x" * 64])))
    else:
        place = data.draw(st.integers(0, 7 + int.from_bytes(whole[:8], "little")))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << data.draw(st.integers(0, 7))
        cached.write_bytes(flipped)
    caplog.clear()
    assert same(loaded(checkpoint), expected)
    assert "made anew" in caplog.text
    assert cached.read_bytes() == whole


def test_what_cannot_be_written_whole_is_not_written(checkpoint, monkeypatch, caplog):
    def cut_off(path, *_):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "write_tensors", cut_off)
    loaded(checkpoint)
    assert "The quantised base is not kept" in caplog.text
    assert [path.name for path in checkpoint.parent.iterdir()] == ["model.safetensors"]


def test_one_process_of_several_keeps_it(checkpoint, monkeypatch):
    monkeypatch.setattr(cache.dist, "is_initialized", lambda: True)
    for rank, kept in ((1, False), (0, True)):
        monkeypatch.setattr(cache.dist, "get_rank", lambda rank=rank: rank)
        loaded(checkpoint)
        assert checkpoint.with_name(f"model.safetensors.{NAME}").exists() == kept
