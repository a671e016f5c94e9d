"""Convert a checkpoint of openpi's JAX training, or a training checkpoint with adapters only, into an adapter folder.

examples:
  python -m openpi_lora_patch.convert jax CHECKPOINT --config pi0_libero_low_mem_finetune --out ADAPTER
  python -m openpi_lora_patch.convert jax CHECKPOINT --merged float32 --out MERGED
  python -m openpi_lora_patch.convert training checkpoints/CONFIG/EXP/STEP --out ADAPTER
"""

from __future__ import annotations

import argparse
import sys

import torch
import tqdm

from .checkpoint import adapters, jax
from .errors import CheckpointError, OpenpiLoraError


def main(arguments: list[str] | None = None) -> int:
    """Convert; returns 0, or 1 with the error on stderr."""
    options = _parser().parse_args(arguments)
    try:
        if options.kind == "jax":
            _from_jax(options)
        else:
            _from_training(options)
    except OpenpiLoraError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"written: {options.out}")
    return 0


def _from_jax(options: argparse.Namespace) -> None:
    jax.convert(
        options.checkpoint,
        options.out,
        openpi_config=options.config,
        alpha=tuple(options.alpha) if options.alpha else None,
        rslora=options.rslora,
        merged=getattr(torch, options.merged) if options.merged else None,
        progress=lambda names: tqdm.tqdm(names, desc="converting", file=sys.stderr),
    )


def _from_training(options: argparse.Namespace) -> None:
    adapter = adapters.read_adapter(options.checkpoint)
    if "version" not in adapter.metadata:
        raise CheckpointError(f"{options.checkpoint} was not written by a training run with OPENPI_LORA_SAVE=adapter.")
    adapters.write_adapter(adapter, options.out)


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
    alpha = (
        "alpha of PaliGemma's and of the expert's attention adapters; by default their ranks, as openpi's variants have"
    )
    from_jax.add_argument("--alpha", nargs=2, type=float, metavar=("PALIGEMMA", "EXPERT"), help=alpha)
    from_jax.add_argument("--rslora", action="store_true", help="attention was scaled by alpha / sqrt(rank)")
    training = kinds.add_parser(
        "training", help="a checkpoint of OPENPI_LORA_SAVE=adapter", description=__doc__, formatter_class=raw
    )
    for command in (from_jax, training):
        command.add_argument("checkpoint")
        command.add_argument("--out", required=True, help="a new folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
