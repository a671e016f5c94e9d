"""Loading a tensor at a time: the same model as ever, in little memory; what nothing uses need not be in the file."""

import copy
import os
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from openpi_lora_patch.apply import apply_lora
from openpi_lora_patch.build import checkpoint_follows, complete, initialising
from openpi_lora_patch.checkpoint import files
from openpi_lora_patch.checkpoint.stored import stored_tensors
from openpi_lora_patch.checkpoint.streaming import load_model, streaming
from openpi_lora_patch.checkpoint.training import load_adapters_through, save_adapters_only
from openpi_lora_patch.errors import CheckpointError, LoRAError
from openpi_lora_patch.lora import LoRAConfig, lora_layers
from openpi_lora_patch.lora.config import FFN
from openpi_lora_patch.lora.quantized import UnusedLinear, quantize
from openpi_lora_patch.pi0 import PI0, PI0Config, Tower
from test_bad_input import DTYPES, damaged, many
from test_fast import adapted

# Wide MLPs, with adapters: nearly all that there is.
TOWER = Tower(width=64, mlp_dim=2**16, depth=6, num_heads=2, head_dim=32)
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LARGE = PI0Config(vocab_size=128, paligemma=TOWER, expert=TOWER, vision=VISION)
# Prints how many bytes of memory the process had at most, before it built the model and once that was loaded.
MEASURE = """
import sys, test_streaming

def most():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = most()
model = test_streaming.awaiting(test_streaming.LARGE, sys.argv[1])
test_streaming.load_model(model, sys.argv[2])
assert all(layer.weight.any() for layer in test_streaming.lora_layers(model).values())
print(before, most())
"""


def awaiting(config, base):
    """A model that is built for a checkpoint, as openpi's are where one follows."""
    with checkpoint_follows():
        with initialising():
            model = PI0(config)
        targets = dict.fromkeys(FFN, LoRAConfig(rank=1, alpha=1.0))
        apply_lora(model, paligemma=targets, action_expert=targets)
        if base != "bf16":
            quantize(lora_layers(model).values(), base)
        complete(model)
    return model


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base checkpoint of some 300 MB, written without holding it."""
    with torch.device("meta"):
        state = PI0(LARGE).state_dict()
    del state["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"]  # Tied to the `lm_head`.
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    files.write_tensors(path, specs, ((name, torch.ones_like(t, device="cpu")) for name, t in state.items()), {})
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory a process had")
@pytest.mark.parametrize(("base", "held"), [("bf16", 1.0), ("int8", 0.5)])
def test_building_and_loading_takes_what_the_model_holds_and_little_more(base, held, large, child):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    # Freed memory goes back at once, as it does at full size, where tensors are beyond glibc's own threshold.
    result = child("-c", MEASURE, base, str(large), PYTHONPATH=path, MALLOC_MMAP_THRESHOLD_="1000000")
    assert result.returncode == 0, result.stderr
    before, most = map(int, result.stdout.split())
    whole = large.stat().st_size
    assert whole > 300e6
    assert (most - before) / whole < held + 0.35  # The whole file besides would be 1 more.


def own(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("base", ["bf16", "int8"])
def test_it_loads_what_safetensors_loads(base, tmp_path):
    model, _ = adapted("pi0", torch.float32)
    if base != "bf16":
        quantize(lora_layers(model).values(), base)
    state = own(model.state_dict())
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    turned = {name: t.T.contiguous() if ".lora_" in name else t for name, t in state.items()}
    for layout in (state, plain, turned):
        tied = {name: tensor + 1 for name, tensor in layout.items() if not name.endswith("embed_tokens.weight")}
        safetensors.torch.save_file(tied, tmp_path / "model.safetensors")
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        safetensors.torch.load_model(one, tmp_path / "model.safetensors")
        load_model(other, tmp_path / "model.safetensors", device="cuda")  # Which is not there, and not asked for.
        for name, tensor in one.state_dict().items():
            assert torch.equal(other.state_dict()[name], tensor), name


def test_an_adapter_goes_onto_its_base_from_two_files(tmp_path):
    model, _ = adapted("pi0", torch.float32)
    plain = {name.replace(".base_layer.", "."): t for name, t in own(model.state_dict()).items() if "lora_" not in name}
    safetensors.torch.save_file(plain, tmp_path / "base.safetensors")
    other = copy.deepcopy(model)
    save_adapters_only(model)
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    for parameter in other.parameters():
        parameter.data.zero_()
    load_adapters_through(other, tmp_path / "base.safetensors")
    load_model(other, tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with a base checkpoint, a whole one and one of adapters alone, by these names."""
    folder = tmp_path_factory.mktemp("stored")
    model, _ = adapted("pi0", torch.float32)
    whole = {name: t for name, t in own(model.state_dict()).items() if "embed_tokens" not in name}  # As it is tied.
    plain = {name.replace(".base_layer.", "."): t for name, t in whole.items() if ".lora_" not in name}
    for name, tensors in (("base", plain), ("whole", whole)):
        safetensors.torch.save_file(tensors, folder / name)
    save_adapters_only(model)
    safetensors.torch.save_model(model, folder / "adapters")
    return folder


def altered(path, data):
    """Another valid file: a tensor is missing, has another name, shape or dtype, or one that no model has is added."""
    tensors = safetensors.torch.load_file(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["gone", "renamed", "added", "shape", "dtype"]))
    tensor = tensors[name].clone() if kind == "added" else tensors.pop(name)
    if kind in ("renamed", "added"):
        tensors[data.draw(st.sampled_from(["x", f"{name}.x", f"model.{name}", name[1:]]))] = tensor
    elif kind == "shape":
        like = st.sampled_from([(*tensor.shape, 1), tensor.shape[1:], (tensor.numel() + 1,), tensor.shape[::-1]])
        tensors[name] = torch.ones(data.draw(like), dtype=tensor.dtype)
    elif kind == "dtype":
        tensors[name] = tensor.to(data.draw(st.sampled_from(DTYPES)))
    safetensors.torch.save_file(tensors, path)


def memory(model):
    """What a model holds, to the bit: NaNs too."""
    held = own(model.state_dict()) | {
        f"{name}.{part}": getattr(module.base_layer, part).clone()
        for name, module in lora_layers(model).items()
        for part in ("data", "scale")
        if hasattr(module.base_layer, "scale")
    }
    return {name: tensor.reshape(-1).contiguous().view(torch.uint8) for name, tensor in held.items()}


@pytest.mark.parametrize("base", ["bf16", "int8"])
@many(60)
@given(data=st.data())
def test_a_file_is_loaded_whole_or_nothing_changes(base, stored, tmp_path, data):
    shutil.copytree(stored, tmp_path, dirs_exist_ok=True)
    model, _ = adapted("pi0", torch.float32)
    if base != "bf16":
        quantize(lora_layers(model).values(), base)
    load_adapters_through(model, tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    before, source = memory(model), tmp_path / data.draw(st.sampled_from(["adapters", "base", "whole"]))
    hurt = tmp_path / data.draw(st.sampled_from(sorted({source.name, "base"})))
    if data.draw(st.booleans()):
        altered(hurt, data)
    else:
        content = bytearray(hurt.read_bytes())
        if data.draw(st.booleans()):
            place = data.draw(st.integers(0, 7 + int.from_bytes(content[:8], "little")))
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            content = damaged(content, data)
        hurt.write_bytes(content)
    other = copy.deepcopy(model)
    try:
        load_model(model, source)
    except CheckpointError:
        after = memory(model)
        assert after.keys() == before.keys()
        assert [name for name in before if not torch.equal(after[name], before[name])] == []
    else:
        safetensors.torch.load_model(other, source)  # Which refuses, in its own way, what is not whole.
        expected, found = memory(other), memory(model)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_what_is_missing_or_foreign_is_named_and_models_without_adapters_are_not_our_business(tmp_path):
    model, _ = adapted("pi0", torch.float32)
    state = own(model.state_dict())
    state["foreign"] = state.pop("action_out_proj.bias")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"(?s)action_out_proj\.bias.*foreign"):
        load_model(model, tmp_path / "model.safetensors")
    missing, unexpected = load_model(model, tmp_path / "model.safetensors", strict=False)
    assert (missing, unexpected) == (["action_out_proj.bias"], ["foreign"])
    linear = torch.nn.Linear(2, 3)
    safetensors.torch.save_model(linear, tmp_path / "linear.safetensors")
    load_model(linear, tmp_path / "linear.safetensors", device="cpu")
    assert streaming(keep=False).torch.save_model is safetensors.torch.save_model


def test_a_tensor_stays_in_its_file_until_it_is_used(tmp_path):
    path, value = tmp_path / "some.safetensors", torch.randn(3, 4).bfloat16()
    safetensors.torch.save_file({"x": value}, path)
    stored = stored_tensors(path)["x"]
    assert (stored.shape, stored.dtype) == (value.shape, value.dtype)
    assert torch.equal(stored.T.float() + 1, value.T.float() + 1)
    safetensors.torch.save_file({"x": value + 1}, path)
    with pytest.raises(CheckpointError, match="was replaced while it was loaded"):
        stored.clone()
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        stored.clone()


@pytest.mark.parametrize("base", ["bf16", "int8"])
def test_a_model_that_awaits_a_checkpoint_does_nothing_before_all_of_it_is_there(base):
    config = PI0Config(vocab_size=128, paligemma=Tower(64, 128, 2), expert=Tower(64, 128, 2), vision=VISION)
    model = awaiting(config, base)
    state = PI0(config).state_dict()
    part = {name: tensor for name, tensor in state.items() if "action_in_proj" not in name}
    for load in (lambda: None, lambda: model.load_state_dict(part, strict=False)):
        load()
        with pytest.raises(LoRAError, match="never loaded"):
            model(None, None, None, None)
    model.load_state_dict({name: t for name, t in state.items() if "embed_tokens" not in name}, strict=False)
    with pytest.raises(TypeError, match="NoneType"):  # From the forward itself.
        model(None, None, None, None)


def test_a_file_may_lack_what_nothing_uses():
    model, _ = adapted("pi0", torch.float32)
    expert = model.paligemma_with_expert.gemma_expert
    expert.lm_head = UnusedLinear(expert.lm_head)
    before, state = expert.lm_head.weight.clone(), own(model.state_dict())
    del state["paligemma_with_expert.gemma_expert.lm_head.weight"]
    model.load_state_dict(state)
    assert torch.equal(expert.lm_head.weight, before)
    assert model.state_dict().keys() - state == {"paligemma_with_expert.gemma_expert.lm_head.weight"}
