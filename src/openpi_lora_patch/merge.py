"""Merge an adapter into its base: one plain checkpoint that stock openpi loads without this package.

example: python -m openpi_lora_patch.merge BASE ADAPTER --out MERGED --dtype bfloat16
"""

from __future__ import annotations

import argparse
import importlib
import sys

import torch
import tqdm

from . import activation
from .checkpoint import merge
from .errors import OpenpiLoraError
from .lora.quantized import FORMATS

_DTYPES = {"base": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Merge and print what rounding cost; returns 0, or 1 with the error on stderr."""
    options = _parser().parse_args(arguments)
    try:
        report = merge.merge(
            options.base,
            options.adapter,
            options.out,
            dtype=_DTYPES[options.dtype],
            quantize=options.quantize,
            check_base=not options.any_base,
            progress=lambda names: tqdm.tqdm(names, desc="merging", file=sys.stderr),
        )
        print(f"{'linear':<84} {'worst error':>12} {'mean error':>12} {'kept':>7} {'drift':>7} {'requantized':>11}")
        for name, cost in report.items():
            figures = (
                f"{cost.worst:12.3e} {cost.mean:12.3e} {cost.kept:7.4f} {cost.drift:7.4f} {cost.requantized:11.4f}"
            )
            print(f"{name:<84} {figures}")
        if options.actions:
            _print_effect_on_actions(options)
    except (OpenpiLoraError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _print_effect_on_actions(options: argparse.Namespace) -> None:
    activation.activate()
    actions = importlib.import_module(".checkpoint.actions", __package__)  # Needs transformers, which merging does not.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = actions.effect(options.base, options.adapter, options.out, device=device)
    print("\nnormalised actions of a random observation, against those of the merge before rounding:")
    print(f"{'rounding moves them by':<84} {found.worst:12.3e} {found.mean:12.3e}")
    print(f"{'the adapter moves them by':<84} {found.adapter_worst:12.3e} {found.adapter_mean:12.3e}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m openpi_lora_patch.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", help="plain checkpoint: model.safetensors, or its folder")
    parser.add_argument("adapter", help="folder of the adapter")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--dtype", choices=_DTYPES, default="base", help="of the result; float32 keeps all of it")
    parser.add_argument("--quantize", choices=FORMATS, default="", help="round to what such an OPENPI_LORA_BASE holds")
    parser.add_argument("--actions", action="store_true", help="also sample actions before and after rounding (16 GB)")
    parser.add_argument("--any-base", action="store_true", help="take a base that the adapter was not trained on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
