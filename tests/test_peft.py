"""Adapters go to PEFT and come from it with equal outputs; what is no plain LoRA is refused."""

import contextlib
import json
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openpi_lora_patch.checkpoint import adapters, peft
from openpi_lora_patch.errors import CheckpointError
from openpi_lora_patch.lora import LoRAConfig, inject, lora_layers
from test_adapters import DATA, loss, pi0, train

NAMES = ("one.q_proj", "one.k_proj", "two.q_proj", "two.mlp.up_proj")


def plain():
    """A small model whose names PEFT's patterns can confuse."""
    torch.manual_seed(0)
    one = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "k_proj": nn.Linear(6, 6)})
    two = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "mlp": nn.ModuleDict({"up_proj": nn.Linear(6, 6)})})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = one, two, nn.Linear(6, 3)

        def forward(self, x):
            for name in NAMES:
                x = torch.tanh(self.get_submodule(name)(x))
            return self.head(x)

    return Model().requires_grad_(False)


X = torch.linspace(-1, 1, 12).reshape(2, 6)


@pytest.mark.parametrize("preset", ["default", "jax", "adapters"])
def test_peft_loads_what_we_save(tmp_path, preset):
    library = pytest.importorskip("peft", reason="PEFT is not installed")
    model = pi0(preset, seed=0)
    adapters.save_adapter(model, tmp_path / "adapter")
    theirs = library.PeftModel.from_pretrained(DATA.pi0(), tmp_path / "adapter")
    expected = loss(model)
    found = loss(theirs.base_model.model)
    assert not torch.equal(expected, loss(DATA.pi0()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_both_ways_with_any_ranks_and_scalings(tmp_path_factory, data):
    library = pytest.importorskip("peft", reason="PEFT is not installed")
    folder = tmp_path_factory.mktemp("peft")
    chosen = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    configs = {
        name: LoRAConfig(data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1.0, 4.0, 24.0])), rslora)
        for name in chosen
        for rslora in [data.draw(st.booleans())]
    }
    ours = plain()
    for name, config in configs.items():
        parent, _, child = name.rpartition(".")
        inject(ours.get_submodule(parent), {child: config})
    ours.head.requires_grad_(True)
    train(ours, 1)
    adapters.save_adapter(ours, folder / "ours")
    theirs = library.PeftModel.from_pretrained(plain(), folder / "ours")
    torch.testing.assert_close(theirs(X), ours(X), rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(folder / "theirs")
    back = plain()
    adapters.load_adapter(back, folder / "theirs")
    assert torch.equal(back(X), ours(X))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_patterns_and_short_names_load(tmp_path, rslora):
    library = pytest.importorskip("peft", reason="PEFT is not installed")
    config = library.LoraConfig(
        r=2,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["q_proj", "up_proj"],
        modules_to_save=["head"],
        rank_pattern={"two.q_proj": 3, "up_.*": 1},
        alpha_pattern={r"^one\.q_proj": 5},
        init_lora_weights=False,
    )
    theirs = library.get_peft_model(plain(), config)
    train(theirs, 0)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = plain()
    adapters.load_adapter(ours, tmp_path / "theirs")
    assert {name: layer.config.rank for name, layer in lora_layers(ours).items()} == {
        "one.q_proj": 2,
        "two.q_proj": 3,
        "two.mlp.up_proj": 1,
    }
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-6)


def test_a_model_inside_a_policy_takes_the_policys_adapter(tmp_path):
    library = pytest.importorskip("peft", reason="PEFT is not installed")
    policy = nn.Module()
    policy.model = plain()
    config = library.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"], init_lora_weights=False)
    theirs = library.get_peft_model(policy, config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = plain()
    adapters.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(X), theirs.base_model.model.model(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", "yes"),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("fan_in_fan_out", True),
        ("peft_type", "LOHA"),
        ("target_parameters", ["experts"]),
        ("r", None),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, option, value):
    model = pi0(seed=0)
    adapters.save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / adapters.CONFIG
    config = json.loads(path.read_text())
    config["rank_pattern"] = {}
    path.write_text(json.dumps(config | {option: value}))
    with pytest.raises(CheckpointError, match=option if value not in (None, "yes") else "no meaning"):
        adapters.load_adapter(DATA.pi0(), tmp_path / "adapter")


def test_mixed_rslora_keeps_each_scaling():
    configs = {"a": LoRAConfig(4, 8.0, rslora=True), "b": LoRAConfig(4, 8.0), "a.b": LoRAConfig(2, 8.0)}
    described = json.loads(json.dumps(peft.describe(configs, [])))
    restored = peft.lora_configs(described, configs)
    assert all(peft.same_function(restored[name], config) for name, config in configs.items())


def ranks(patterns, names):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": patterns}
    return [found.rank for found in peft.lora_configs(config, names).values()]


PIECES = [
    "a",
    "b",
    ".",
    "|",
    "(",
    "(?:",
    ")",
    "a|a",
    "(a|a)",
    "(a+)+",
    ".*",
    "a*",
    "[ab]+",
    "[",
    "]",
    "+",
    "{9}",
    r"\.",
]


@pytest.mark.filterwarnings("ignore:Possible")
@given(pattern=st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
@settings(max_examples=300, deadline=2000)
def test_no_pattern_of_a_strangers_takes_for_ever(pattern):
    name = "a" * 60 + ".b" * 60
    with contextlib.suppress(CheckpointError):
        assert ranks({pattern: 3}, [name]) == [3 if re.match(rf"(.*\.)?({pattern})$", name) else 2]


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "((a|b)*)c", "(a|a)" * 30 + "c", "(.|a)(?:a|.)c", ".*.*.*c", "(a*){9}c", "a" * 300, "(", "[]*]*?+)*"],
)
def test_a_pattern_without_a_bound_is_refused_unmatched(pattern):
    with pytest.raises(CheckpointError, match="no meaning"):
        ranks({pattern: 3}, [f"layers.{i}." + "a" * 60 for i in range(500)])


def test_patterns_that_take_too_long_together_are_refused(monkeypatch):
    names = [".".join("a" * 80) + f"{i}" for i in range(500)]
    named = {re.escape(name): rank for rank, name in enumerate(names, start=1)}
    assert ranks(named, names) == list(named.values())
    monkeypatch.setattr(peft, "_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="20 patterns"):
        ranks({f".+.+(a|.|a.|..|a.a|...)x{i}": 3 for i in range(20)}, names)
    assert time.monotonic() - began < 5
