"""DoRA against its definition in float64, its files, merging, and a quantised base."""

import copy
import dataclasses
import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, load_model, save_model
from torch import nn

import test_adapters
from openpi_lora_patch import LoRAError
from openpi_lora_patch.apply import Counts
from openpi_lora_patch.checkpoint import adapters, jax_export, merge, peft
from openpi_lora_patch.checkpoint.switch import Switcher
from openpi_lora_patch.checkpoint.training import load_adapters_through, save_adapters_only
from openpi_lora_patch.errors import CheckpointError
from openpi_lora_patch.inspect import main as inspect
from openpi_lora_patch.lora import DoRALinear, LoRAConfig, as_jax, kernels, lora_layers
from openpi_lora_patch.lora.quantized import quantize
from openpi_lora_patch.reference import distance
from test_adapters import DATA, altered, assert_equal, bits, first, loss, train
from test_fast import CHANGES, PLAIN, adapted, run
from test_peft import NAMES, X, plain
from test_quantized import FORMATS

CONFIG = LoRAConfig(rank=4, alpha=8.0, use_dora=True)


def make(config=CONFIG, *, sizes=(24, 40), bias=False, dtype=torch.float32, size=0.1):
    torch.manual_seed(0)
    layer = DoRALinear(nn.Linear(*sizes, bias=bias).to(dtype), config)
    with torch.no_grad():
        layer.lora_B.normal_(std=size)
        layer.lora_magnitude_vector.mul_(1 + size * torch.randn(sizes[1]))
    return layer


def exact(layer, x, A=None, B=None, magnitude=None):
    """The definition in float64, the norm a constant."""
    A, B, magnitude = (
        own.detach().double() if given is None else given
        for own, given in zip(layer.parameters(recurse=False), (A, B, magnitude), strict=True)
    )
    directed = layer.weight.double() + layer.scaling * B @ A
    weight = (magnitude / directed.detach().norm(dim=1))[:, None] * directed
    return nn.functional.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())


pi0 = functools.partial(test_adapters.pi0, use_dora=True)
lora_pi0 = test_adapters.pi0


def distances_from_the_definition(layer, *shape):
    """How far the output and the gradients of the input and the three parameters lie from float64's."""
    x, grad = (torch.randn(*shape, size, dtype=layer.weight.dtype) for size in (layer.in_features, layer.out_features))
    own = [x.requires_grad_(), *layer.parameters(recurse=False)]
    wide = [tensor.detach().double().requires_grad_() for tensor in own]
    found, expected = layer(x), exact(layer, *wide)
    assert found.dtype == x.dtype
    gradients = torch.autograd.grad(found, own, grad)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    pairs = zip((found, *gradients), (expected, *wanted), strict=True)
    return [((one.double() - other).norm() / other.norm()).item() for one, other in pairs]


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 16),
    alpha=st.floats(0.1, 16),
    rslora=st.booleans(),
    bias=st.booleans(),
    sizes=st.tuples(st.integers(16, 48), st.integers(16, 48)),
    batch=st.lists(st.integers(1, 4), max_size=2),
)
def test_output_and_gradients_are_those_of_the_definition(rank, alpha, rslora, bias, sizes, batch):
    layer = make(LoRAConfig(rank, alpha, rslora, use_dora=True), bias=bias, sizes=sizes)
    assert max(distances_from_the_definition(layer, *batch, 16)) < 2e-5


@pytest.mark.parametrize("bias", [False, True])
def test_in_bfloat16_they_are_within_its_rounding(bias):
    layer = make(LoRAConfig(16, 16.0, use_dora=True), bias=bias, sizes=(256, 128), dtype=torch.bfloat16)
    assert max(distances_from_the_definition(layer, 64)) < 0.01


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 32),
    sizes=st.tuples(st.integers(16, 200), st.integers(1, 64)),
    size=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_norm_is_that_of_the_matrix_that_is_not_formed(rank, sizes, size, dtype):
    layer = make(LoRAConfig(rank, rank, use_dora=True), sizes=sizes, dtype=dtype, size=size)
    directed = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    error = (layer.weight_norm().double() / directed.norm(dim=1) - 1).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_fresh_adapter_changes_no_bit(dtype, bias):
    layer = DoRALinear(nn.Linear(24, 40, bias=bias).to(dtype), CONFIG)
    x = torch.randn(5, 24, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), layer.weight.float().norm(dim=1))


def test_a_row_of_zeros_stays_one_without_a_nan():
    layer = make(size=0.0)
    with torch.no_grad():
        layer.weight[3] = 0
        layer.follow_base()
    assert not layer(torch.randn(2, 24))[:, 3].any()


def test_magnitudes_stay_float32_and_small_changes_arrive():
    layer = make().bfloat16()
    assert {parameter.dtype for parameter in layer.parameters(recurse=False)} == {torch.float32}
    x = torch.randn(4096, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        before = layer(x).double()
        layer.lora_magnitude_vector.mul_(1.001)
        kept = ((layer(x).double() - before) * before).sum() / before.square().sum()
    assert kept == pytest.approx(1e-3, rel=0.05)


def test_dropout_reaches_what_is_added_alone():
    layer, x = make(dataclasses.replace(CONFIG, dropout=0.5), bias=True).train(), torch.randn(64, 24)
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    expected = layer.base_layer(x).double() + exact(layer, dropped) - layer.base_layer(dropped).double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.eval()(x).double(), exact(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_it_is_the_same_and_unmerged_the_same_bits(dtype):
    layer = make(dtype=dtype, bias=True).eval()
    x, before = torch.randn(7, 24, dtype=dtype), layer.weight.detach().clone()
    expected = exact(layer, x)
    layer.merge()
    assert (layer(x).double() - expected).norm() < (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_compiles_without_a_graph_break():
    layer, x = make(), torch.randn(3, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    torch.testing.assert_close(compiled(x), layer(x))
    assert all(parameter.grad is not None for parameter in layer.parameters(recurse=False))


def test_the_jax_parametrisation_has_none():
    with pytest.raises(LoRAError, match="no DoRA"):
        as_jax({"q_proj": CONFIG}, heads=2)


@pytest.mark.parametrize("change", [CHANGES[1], CHANGES[-1]])
def test_every_fast_part_computes_what_the_layers_do(change):
    model, inputs = adapted("pi0", torch.float32, use_dora=True)
    train(model, 0)
    assert not any(kernels.fusable(layer) for layer in lora_layers(model).values())
    (_, expected), gradients = run(model, inputs, PLAIN)
    (_, found), again = run(model, inputs, dataclasses.replace(PLAIN, **change))
    assert distance(found, expected) < 1e-4
    assert [name for name in gradients if "magnitude" in name]
    for name, gradient in gradients.items():
        assert (again[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max().clamp(min=1e-6), name


def test_a_base_checkpoint_gives_fresh_magnitudes_and_leaves_trained_ones(tmp_path):
    other = train(DATA.pi0(), 5)
    save_model(other, tmp_path / "base.safetensors")
    model = pi0()
    load_model(model, tmp_path / "base.safetensors")
    assert torch.equal(loss(model), loss(other))
    model = pi0(seed=1)
    before = {n: p for n, p in bits(model).items() if "lora_" in n}
    load_model(model, tmp_path / "base.safetensors")
    assert_equal({n: p for n, p in bits(model).items() if "lora_" in n}, before)


def test_counts_and_freezing():
    model, without = pi0(), lora_pi0()
    layers = lora_layers(model)
    magnitudes = sum(layer.out_features for layer in layers.values())
    assert Counts.of(model).lora_tensors == 3 * len(layers)
    assert Counts.of(model).trainable == Counts.of(without).trainable + magnitudes


def test_an_adapter_folder_comes_back_bit_for_bit(tmp_path):
    model = pi0(seed=0)
    adapters.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / adapters.CONFIG).read_text())["use_dora"] is True
    for fresh in (pi0(), DATA.pi0()):
        adapters.load_adapter(fresh, tmp_path / "adapter")
        assert_equal(bits(fresh), bits(model))
        assert torch.equal(loss(fresh), loss(model))


@pytest.mark.parametrize("adapters_only", [True, False])
def test_a_training_checkpoint_comes_back_bit_for_bit(tmp_path, adapters_only):
    models = [pi0(seed=0), pi0()]
    for model in models:
        if adapters_only:
            load_adapters_through(model)
            save_adapters_only(model)
    save_model(models[0], tmp_path / "model.safetensors")
    load_model(models[1], tmp_path / "model.safetensors")
    assert_equal(bits(models[1]), bits(models[0]))


WRONG = {
    "missing": (lambda t: t.pop(first(t, "magnitude")), "missing: .*lora_magnitude_vector"),
    "shape": (lambda t: t.update({first(t, "magnitude"): torch.ones(3)}), r"magnitude_vector \(3,\)"),
    "nan": (lambda t: t[first(t, "magnitude")].fill_(float("nan")), "lora_magnitude_vector"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_named_and_changes_nothing(tmp_path, wrong):
    adapters.save_adapter(pi0(seed=0), tmp_path / "adapter")
    change, message = WRONG[wrong]
    altered(tmp_path / "adapter", change)
    for model in (pi0(), DATA.pi0()):
        before = bits(model)
        with pytest.raises(CheckpointError, match=message):
            adapters.load_adapter(model, tmp_path / "adapter")
        assert_equal(bits(model), before)
    save_model(DATA.pi0(), tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match="magnitude"):
        merge.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lora_and_dora_are_not_taken_for_each_other(tmp_path):
    adapters.save_adapter(pi0(seed=0), tmp_path / "dora")
    adapters.save_adapter(lora_pi0(seed=0), tmp_path / "lora")
    for model, folder in ((pi0(), "lora"), (lora_pi0(), "dora")):
        with pytest.raises(CheckpointError, match="OPENPI_LORA_DORA"):
            Switcher(model, {"one": tmp_path / folder})
    config = tmp_path / "dora" / adapters.CONFIG
    config.write_text(config.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(CheckpointError, match=r"unexpected: .*magnitude"):
        adapters.load_adapter(DATA.pi0(), tmp_path / "dora")


def test_some_with_and_some_without_are_not_saved():
    with pytest.raises(CheckpointError, match="all adapters or for none"):
        peft.describe({"a": CONFIG, "b": LoRAConfig(4, 8.0)}, [])


def test_a_server_switches_among_them(tmp_path):
    model, losses = pi0(), {None: loss(pi0())}
    for seed, name in enumerate(("one", "two")):
        trained = pi0(seed=seed)
        adapters.save_adapter(trained, tmp_path / name)
        losses[name] = loss(trained)
    switcher = Switcher(model, {name: tmp_path / name for name in ("one", "two")})
    for name in ("one", "two", None, "two"):
        with switcher.using(name):
            assert torch.equal(loss(model), losses[name])


def test_a_merged_checkpoint_computes_the_same_on_a_plain_model(tmp_path, capsys):
    model = pi0(seed=0)
    adapters.save_adapter(model, tmp_path / "adapter")
    save_model(DATA.pi0(), tmp_path / "base.safetensors")
    report = merge.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out")
    load_model(merged := DATA.pi0(), tmp_path / "out" / "model.safetensors")
    assert distance(loss(merged), loss(model)) < 1e-5
    assert distance(loss(merged), loss(DATA.pi0())) > 1e-3
    assert report.keys() == lora_layers(model).keys()
    assert inspect([str(tmp_path / "adapter")]) == 0
    assert "use_dora: True" in capsys.readouterr().out


@pytest.mark.parametrize("whole", [True, False])
def test_jax_is_refused_it(tmp_path, whole):
    save_model(pi0(seed=0) if whole else DATA.pi0(), tmp_path / "model.safetensors")
    adapters.save_adapter(pi0(seed=0), tmp_path / "adapter")
    source = {} if whole else {"base": tmp_path / "model.safetensors"}
    with pytest.raises(CheckpointError, match="DoRA"):
        jax_export.export(tmp_path / ("model.safetensors" if whole else "adapter"), tmp_path / "out", **source)
    assert not (tmp_path / "out").exists()


def dense(held):
    """The same model, with plain Linears that hold what the quantised ones compute with."""
    plain = copy.deepcopy(held)
    for layer in lora_layers(plain).values():
        weight = nn.Parameter(layer.weight, requires_grad=False)
        layer.base_layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        layer.base_layer.weight = weight
    return plain


@pytest.mark.parametrize("name", ["bf16", *FORMATS])
def test_no_weight_is_kept_beside_the_base(name):
    layer = make(sizes=(96, 128), dtype=torch.bfloat16)
    if name != "bf16":
        quantize([layer], name)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(4, 96, dtype=torch.bfloat16, requires_grad=True))
    base = layer.weight if name == "bf16" else layer.base_layer.data
    large = [tensor for tensor in kept if tensor.numel() * tensor.element_size() >= 96 * 128 / 2]
    assert {tensor.data_ptr() for tensor in large} == {base.data_ptr()}


@pytest.mark.parametrize("name", FORMATS)
def test_on_a_quantised_base(tmp_path, name):
    model, inputs = adapted("pi0", torch.float32, use_dora=True)
    for layer in lora_layers(model).values():
        nn.init.zeros_(layer.lora_B)
    quantize(lora_layers(model).values(), name)
    for layer in lora_layers(model).values():
        torch.testing.assert_close(layer.lora_magnitude_vector.detach(), layer.weight.float().norm(dim=1))
    plain = dense(train(model, 0).bfloat16())
    inputs = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
    for plan in (PLAIN, dataclasses.replace(PLAIN, fused=True, checkpoint="layer")):
        (_, found), gradients = run(model, inputs, plan)
        (_, expected), wanted = run(plain, inputs, plan)
        assert torch.equal(found, expected)
        assert_equal(gradients, wanted)
    adapters.save_adapter(model, tmp_path / "adapter")
    save_model(DATA.pi0().bfloat16(), tmp_path / "base.safetensors")
    merge.merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for linear, layer in lora_layers(model).items():
        weight = layer.weight.float() + layer.delta_weight()
        torch.testing.assert_close(merged[f"{linear}.weight"], weight, rtol=1e-5, atol=1e-6)


def bitsandbytes_linear(weight):
    """PEFT's own kind of 4-bit base."""
    library = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
    options = {"quant_type": "nf4", "compress_statistics": False}
    linear = library.Linear4bit(*reversed(weight.shape), bias=False, compute_dtype=torch.float32, **options)
    linear.weight = library.Params4bit(weight, requires_grad=False, **options)
    return linear.to("cpu")


def plain_linear(weight):
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight.float()
    return linear


@pytest.mark.parametrize("name", ["bf16", *FORMATS])
def test_peft_on_the_same_base_starts_alike_and_has_the_gradients(name):
    library = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    weight = torch.randn(96, 128).bfloat16()
    layer = DoRALinear(plain_linear(weight), CONFIG)
    if name != "bf16":
        quantize([layer], name)
    fresh = copy.deepcopy(layer)
    for base in [plain_linear(layer.weight)] + [bitsandbytes_linear(weight)] * (name == "nf4"):
        layer = copy.deepcopy(fresh)
        config = library.LoraConfig(r=CONFIG.rank, lora_alpha=CONFIG.alpha, use_dora=True, target_modules=["0"])
        theirs = library.get_peft_model(nn.Sequential(base), config)
        pairs = counterparts(layer, theirs.base_model.model[0])
        torch.testing.assert_close(*pairs[-1], rtol=1e-6, atol=0)
        with torch.no_grad():
            for mine, other in pairs:
                other.copy_(mine.normal_(1.0, 0.1))
        one = torch.randn(7, 128, requires_grad=True)
        two = one.detach().clone().requires_grad_()
        outputs = layer(one), theirs(two)
        for output in outputs:
            output.square().sum().backward()
        for mine, other in [outputs, *((m.grad, o.grad) for m, o in [(one, two), *pairs])]:
            # A base in fewer bits makes a bfloat16 weight, whose product with A is rounded so for the norms.
            assert distance(mine, other) < (1e-5 if name == "bf16" else 1e-3)


def counterparts(layer, theirs):
    """Our three parameters beside those of PEFT's layer."""
    return [
        (layer.lora_A, theirs.lora_A["default"].weight),
        (layer.lora_B, theirs.lora_B["default"].weight),
        (layer.lora_magnitude_vector, theirs.lora_magnitude_vector["default"].weight),
    ]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_to_peft_and_back_with_any_ranks_and_scalings(tmp_path_factory, data):
    library = pytest.importorskip("peft", reason="PEFT is not installed")
    folder = tmp_path_factory.mktemp("peft")
    ours = plain()
    for name in data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True)):
        parent, _, child = name.rpartition(".")
        config = LoRAConfig(data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1.0, 4.0])), use_dora=True)
        setattr(ours.get_submodule(parent), child, DoRALinear(ours.get_submodule(name), config))
    train(ours, 1)
    adapters.save_adapter(ours, folder / "ours")
    theirs = library.PeftModel.from_pretrained(plain(), folder / "ours")
    torch.testing.assert_close(theirs(X), ours(X), rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(folder / "theirs")
    back = plain()
    adapters.load_adapter(back, folder / "theirs")
    assert torch.equal(back(X), ours(X))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_from_peft_with_its_gradients(tmp_path, dropout):
    library = pytest.importorskip("peft", reason="PEFT is not installed")
    config = library.LoraConfig(
        r=2,
        lora_alpha=6,
        lora_dropout=dropout,
        use_dora=True,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"two.q_proj": 3},
        init_lora_weights=False,
    )
    theirs = train(library.get_peft_model(plain(), config), 0)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = plain()
    adapters.load_adapter(ours, tmp_path / "theirs")
    for model in (ours, theirs):
        torch.manual_seed(0)
        model.train()(X).square().sum().backward()
    for name in ("one.q_proj", "two.q_proj", "two.mlp.up_proj"):
        for one, two in counterparts(ours.get_submodule(name), theirs.base_model.model.get_submodule(name)):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.eval()(X), theirs.eval()(X), rtol=1e-5, atol=1e-6)
