"""Convert checkpoints of openpi's JAX training to PyTorch and back, and training checkpoints into adapter folders.

examples:
  python -m openpi_lora_patch.convert jax CHECKPOINT --config pi0_libero_low_mem_finetune --out ADAPTER
  python -m openpi_lora_patch.convert jax CHECKPOINT --merged float32 --out MERGED
  python -m openpi_lora_patch.convert to-jax ADAPTER --base BASE --out CHECKPOINT
  python -m openpi_lora_patch.convert to-jax checkpoints/CONFIG/EXP/STEP --out CHECKPOINT
  python -m openpi_lora_patch.convert training checkpoints/CONFIG/EXP/STEP --out ADAPTER
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

import torch
import tqdm

from .checkpoint import adapters, jax, jax_export
from .errors import CheckpointError, OpenpiLoraError


def main(arguments: list[str] | None = None) -> int:
    """Convert; returns 0, or 1 with the error on stderr."""
    options = _parser().parse_args(arguments)
    try:
        _COMMANDS[options.kind](options)
    except (OpenpiLoraError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"written: {options.out}")
    return 0


def _from_jax(options: argparse.Namespace) -> None:
    jax.convert(
        options.checkpoint,
        options.out,
        openpi_config=options.config,
        alpha=options.alpha,
        rslora=options.rslora,
        merged=getattr(torch, options.merged) if options.merged else None,
        progress=_progress,
    )


def _to_jax(options: argparse.Namespace) -> None:
    jax_export.export(
        options.checkpoint,
        options.out,
        base=options.base,
        alpha=options.alpha,
        rslora=options.rslora,
        check_base=not options.any_base,
        progress=_progress,
    )


def _from_training(options: argparse.Namespace) -> None:
    adapter = adapters.read_adapter(options.checkpoint)
    if "version" not in adapter.metadata:
        raise CheckpointError(f"{options.checkpoint} was not written by a training run with OPENPI_LORA_SAVE=adapter.")
    adapters.write_adapter(adapter, options.out)


def _progress(names: Iterable[str]) -> Iterable[str]:
    return tqdm.tqdm(names, desc="converting", file=sys.stderr)


_COMMANDS = {"jax": _from_jax, "to-jax": _to_jax, "training": _from_training}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m openpi_lora_patch.convert", description=__doc__, formatter_class=raw
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    from_jax = kinds.add_parser(
        "jax", help="a checkpoint of openpi's JAX training", description=__doc__, formatter_class=raw
    )
    from_jax.add_argument("--config", help="name of the training config; it is written into the adapter")
    from_jax.add_argument("--merged", choices=("float32", "bfloat16"), help="write a merged checkpoint of this dtype")
    to_jax = kinds.add_parser(
        "to-jax",
        help="an adapter or a checkpoint, for openpi's JAX code",
        description=__doc__,
        formatter_class=raw,
    )
    to_jax.add_argument("--base", help="the plain PyTorch checkpoint that the adapter was trained on")
    to_jax.add_argument("--any-base", action="store_true", help="do not check that the adapter was trained on it")
    alpha = "alpha of the JAX variants of PaliGemma and of the expert; by default their ranks, as openpi's have"
    for command in (from_jax, to_jax):
        command.add_argument("--alpha", nargs=2, type=float, metavar=("PALIGEMMA", "EXPERT"), help=alpha)
        command.add_argument("--rslora", action="store_true", help="they scale attention by alpha / sqrt(rank)")
    training = kinds.add_parser(
        "training", help="a checkpoint of OPENPI_LORA_SAVE=adapter", description=__doc__, formatter_class=raw
    )
    for command in (from_jax, to_jax, training):
        command.add_argument("checkpoint")
        command.add_argument("--out", required=True, help="a new folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
