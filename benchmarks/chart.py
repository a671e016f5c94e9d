"""Draw the README's bar chart from rows that `train.py` wrote: `python benchmarks/chart.py ROWS.json OUT.png`."""

from __future__ import annotations

import json
import pathlib
import sys

import matplotlib.pyplot as plt

LABELS = {
    "peft": "PEFT, defaults",
    "full": "full fine-tuning",
    "peft bfloat16": "PEFT, bfloat16",
    "naive": "naive LoRALinear",
    "default but checkpoint layer": "ours, every layer checkpointed",
    "ours, default settings": "ours",
    "frozen floor": "ours without adapters (floor)",
}


def main() -> None:
    source, target = map(pathlib.Path, sys.argv[1:])
    content = json.loads(source.read_text())
    rows = {row["name"]: row for row in content["rows"] if "ms" in row}
    names = [name for name in reversed(LABELS) if name in rows]
    colours = ["#c44e52" if "ours" in LABELS[name] else "#8c8c8c" for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    for axis, key, title in zip(axes, ("ms", "peak GiB"), ("ms a step", "peak memory, GiB"), strict=True):
        bars = axis.barh([LABELS[name] for name in names], [rows[name][key] for name in names], color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    model = "pi0.5" if content["pi05"] else "pi0"
    figure.suptitle(f"{model}, LoRA on both towers, batch 32, {content['gpu']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
