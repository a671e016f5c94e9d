"""A step of ours beside one of the frozen floor: both models on one GPU, in turn, so that both find the same clocks.

Needs what `train.py` needs, and memory for both; run as `python benchmarks/floor.py --help`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics

import models
import torch

HOWS = ("ours", "floor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4, help="of each model in a round")
    parser.add_argument("--pi05", action="store_true")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    options = parser.parse_args()
    steps = {}
    for how in HOWS:
        model = models.build(how, pi05=options.pi05, checkpoint="none")
        steps[how] = models.training_step(model, *models.batch(model, options.batch))
    # The first step of each does not count, as it follows steps of the other model; nor does the first round.
    rounds = [
        {how: models.milliseconds(steps[how], options.steps, skipped=1) for how in HOWS}
        for _ in range(1 + options.rounds)
    ][1:]
    medians = {how: statistics.median(ms for each in rounds for ms in each[how]) for how in HOWS}
    ratios = [statistics.median(each["ours"]) / statistics.median(each["floor"]) for each in rounds]
    figures = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "pi05": options.pi05,
        **{f"{how} ms": ms for how, ms in medians.items()},
        "ratio": medians["ours"] / medians["floor"],
        "ratios of rounds": ratios,
    }
    print(
        f"{'pi0.5' if options.pi05 else 'pi0'}, batch {options.batch}, {figures['gpu']}: "
        f"ours {medians['ours']:.1f} ms, floor {medians['floor']:.1f} ms, ratio {figures['ratio']:.4f} "
        f"(rounds {min(ratios):.4f} to {max(ratios):.4f})",
        flush=True,
    )
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
