"""Orders of the steps to a patched process; `python tests/orders.py` runs all of up to four."""

import itertools
import json
import math
from pathlib import Path

import pytest

import orders


def test_the_full_set_is_complete():
    count = len(orders.STEPS)
    full = orders.orders(4)
    assert len(set(full)) == len(full) == sum(math.perm(count, length) for length in range(1, 5))
    assert all(len(set(order)) == len(order) <= 4 for order in full)
    neighbours = {pair for order in full for pair in itertools.pairwise(order)}
    assert neighbours == {(a, b) for a in orders.STEPS for b in orders.STEPS if a != b}


def test_every_ordered_pair_of_steps_ends_patched_off_or_refused_with_the_reason(child):
    result = child(str(Path(orders.__file__)), "--steps", "2", "--spelling", "attribute")
    assert result.returncode == 0, result.stdout + result.stderr
    verdicts = {tuple(found["order"]): found["verdict"] for found in map(json.loads, result.stdout.splitlines())}
    assert verdicts.keys() == set(orders.orders(2))
    assert verdicts["openpi", "activate"] == "patched"
    assert verdicts["activate", "deactivate"] == "off"
    assert verdicts["build", "again"] == f"refused: {orders.BUILT_BEFORE}"
    assert verdicts["us", "within"] == "patched"
    assert verdicts["deactivate", "within"] == f"refused: {orders.HALF_IMPORTED}"


@pytest.mark.parametrize("active", [True, False])
def test_only_models_that_would_have_been_converted_refuse_a_later_activation(child, active):
    """Neither a subclass's, built while active or not, nor one that is gone but for a cycle."""
    code = f"""
from transformers import GemmaConfig, GemmaForCausalLM
import openpi_lora_patch as o
class Theirs(GemmaForCausalLM): pass
config = GemmaConfig(**{orders.SIZES}, use_adarms=True)
if not {active}:
    o.deactivate()
theirs = Theirs(config)
o.deactivate()
gone = GemmaForCausalLM(config)
gone.itself = [gone]
del gone
o.activate()
o.deactivate()
built = GemmaForCausalLM(config).model
try:
    o.activate()
except o.ActivationError as error:
    print("1 unpatched GemmaModel" in str(error))
"""
    result = child("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"
