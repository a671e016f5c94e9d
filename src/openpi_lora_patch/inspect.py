"""Say what a checkpoint is, what it needs to load, and how strong its adapters are.

example: python -m openpi_lora_patch.inspect ADAPTER --plot norms.png
"""

from __future__ import annotations

import argparse
import importlib
import sys

import tqdm

from .checkpoint import inspect
from .errors import CheckpointError, OpenpiLoraError


def main(arguments: list[str] | None = None) -> int:
    """Print the description; returns 0, or 1 with the error on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m openpi_lora_patch.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", help="file or folder")
    parser.add_argument("--plot", help="draw the norms into this file (needs matplotlib)")
    options = parser.parse_args(arguments)
    try:
        found = inspect.describe(
            options.path,
            progress=lambda names: tqdm.tqdm(names, desc="measuring", file=sys.stderr, leave=False, delay=1),
        )
        if options.plot:
            _plot(found, options.plot)
    except (OpenpiLoraError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.path}: {found.kind}\nneeds: {found.needs}")
    for name, value in found.facts.items():
        print(f"{name}: {value}")
    for name, (rank, norm) in found.deltas.items():
        print(f"{name:<84} rank {rank:4d}" + (f"  norm {norm:.4e}" if norm is not None else ""))
    return 0


def _plot(found: inspect.Description, path: str) -> None:
    norms = {name: norm for name, (_, norm) in found.deltas.items() if norm is not None}
    if not norms:
        raise CheckpointError("There is nothing to draw.", found=found.kind, expected="an adapter with its scaling")
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise CheckpointError("Drawing needs matplotlib.", fix="pip install 'openpi-lora-patch[plot]'") from None
    figure = figures.Figure(figsize=(8, 2 + 0.12 * len(norms)), layout="constrained")
    axes = figure.add_subplot(xlabel="Frobenius norm of scaling * B A")
    axes.barh(list(norms), list(norms.values()))
    axes.tick_params(axis="y", labelsize=5)
    axes.invert_yaxis()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
