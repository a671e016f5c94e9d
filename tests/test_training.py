"""The small pi0's training, in every way that has to give the same losses: `tests/training.py` with few steps."""

import argparse

import pytest

import training


@pytest.fixture(scope="module")
def first():
    return run(steps=12)


def run(steps, **options):
    arguments = {"order": training.US, "joint": None, "folder": None, "peft": False, "nudge": False}
    return list(training.train(argparse.Namespace(steps=steps, **{**arguments, **options})))


@pytest.mark.parametrize("policy", ["none", "layer", "auto"])
def test_checkpointing_policies_give_the_same_bits(first, policy):
    assert run(12, joint=policy) == first


def test_a_run_that_is_killed_and_resumed_gives_the_same_bits(first):
    assert training.killed_and_resumed(12, [training.SAVE_EVERY + 2]) == first


@pytest.mark.parametrize("order", [training.ORDERS[3], training.ORDERS[-1]], ids=str)
def test_orders_of_import_give_the_same_bits(first, order):
    assert training.losses(12, "--order", ",".join(order)) == first


def test_peft_trains_the_same_within_rounding(first):
    pytest.importorskip("peft", reason="PEFT is not installed")
    rounding = training.distance(first, run(12, nudge=True))
    assert 0 < rounding < 1e-4
    assert training.distance(first, run(12, peft=True)) <= rounding


def test_the_losses_tell_runs_apart(first):
    assert run(12, nudge=True) != first
    assert len(set(first)) == 13
