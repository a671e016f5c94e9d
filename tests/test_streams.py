"""What the two towers do at once: what runs where and waits for what, without a GPU.

`benchmarks/check.py` holds the gradients against those without, on one.
"""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from openpi_lora_patch.models import joint, streams
from openpi_lora_patch.settings import Settings
from test_fast import MODELS, PLAIN, adapted, run

OVERLAP = dataclasses.replace(PLAIN, overlap=True)


class Stream:
    device = torch.device("cpu")

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def gpu(monkeypatch):
    """Streams that write down what they are told: `main`, which is current, and `side`, the second tower's."""
    log = []
    main, side = Stream("main", log), Stream("side", log)
    current = [main]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: log.append(f"{stream.name} needs {x.item()}"))
    monkeypatch.setattr(streams, "second", lambda device: side)
    return SimpleNamespace(log=log, side=side, current=lambda: current[-1].name)


@pytest.fixture
def places(gpu, monkeypatch):
    """Where each Linear of a model runs, by its module's name, and how often."""
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)

    def watch(model):
        seen = {}
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.register_forward_hook(lambda *_, name=name: seen.setdefault(name, []).append(gpu.current()))
        return seen

    return watch


def test_the_second_waits_for_what_it_is_given_and_is_waited_for(gpu):
    def function(x, extra):
        gpu.log.append(f"{x.item()} on {gpu.current()}")
        return x + 10, x + 20, extra

    first, other = streams.side_by_side(function, (torch.tensor(1), None), (torch.tensor(2), None), gpu.side)
    assert (first[0], other[1]) == (11, 22)
    assert gpu.log == [
        "side waits for main", "side needs 2", "1 on main", "2 on side", "main waits for side", "main needs 12",
        "main needs 22",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_action_expert_leaves_the_main_stream_and_nothing_else_changes(places, kind):
    model, inputs = adapted(kind)
    (_, expected), gradients = run(model, inputs, PLAIN)
    seen = places(model)
    (_, found), found_gradients = run(model, inputs, OVERLAP)
    assert torch.equal(found, expected)
    assert all(torch.equal(found_gradients[name], gradient) for name, gradient in gradients.items())
    layers = len(model.paligemma_with_expert.gemma_expert.model.layers)
    assert all(where == ["side" if "gemma_expert" in name else "main"] for name, where in seen.items())
    assert len(seen) == 2 * 7 * layers


def test_a_layer_that_is_computed_again_stays_on_one_stream(places):
    model, inputs = adapted("pi0")
    seen = places(model)
    run(model, inputs, dataclasses.replace(OVERLAP, checkpoint="layer"))
    assert {place for where in seen.values() for place in where} == {"main"}
    assert max(map(len, seen.values())) == 2


def test_with_other_processes_all_is_on_one_stream(places, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    model, inputs = adapted("pi0")
    seen = places(model)
    run(model, inputs, OVERLAP)
    assert {place for where in seen.values() for place in where} == {"main"}


def test_a_cpu_has_no_second_stream():
    assert not joint.plan(Settings(), torch.device("cpu")).overlap
