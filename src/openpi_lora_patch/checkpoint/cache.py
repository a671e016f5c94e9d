"""The quantised form of a checkpoint's weights, in a file beside it: `model.safetensors.nf4` for `model.safetensors`.

It is a safetensors file, written whole or not at all. Its metadata tells what it was made from and by; where that is
something else now, or the file is damaged, it is made anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import CheckpointError
from ..lora.quantized import FORMATS, Held, QuantizedLinear
from . import adapters, files
from .stored import stored_tensors

logger = logging.getLogger("openpi_lora_patch")

Layers = Mapping[str, QuantizedLinear]

_PARTS = ("data", "scale", "source")
_MADE_FROM = "made_from"
_SAMPLES = 4096


def quantized_layers(model: nn.Module, names: Collection[str]) -> Layers:
    """The quantised layers of `model` whose weights are among a checkpoint's `names`, by these."""
    return {
        key: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
        for key in (f"{name}.weight", f"{name.removesuffix('.base_layer')}.weight")
        if key in names
    }


def read(layers: Layers, checkpoint: files.Path) -> dict[str, Held]:
    """What stands for the weights of `layers`, by their names; nothing where no cache is there that can be used."""
    path = _path(layers, checkpoint)
    if not path.exists():
        return {}
    try:
        with files.reading(path) as file:
            made_from = (file.metadata() or {}).get(_MADE_FROM)
        tensors = stored_tensors(path)
    except CheckpointError as error:
        logger.warning("The quantised base in %s is damaged, and made anew: %s", path, error)
        return {}
    if made_from != _made_from(layers, checkpoint, tensors.items()):
        logger.warning("The quantised base in %s is of another checkpoint, model or version, and made anew", path)
        return {}
    logger.info("The quantised base is read from %s", path)
    return {
        name: Held(tensors[f"{name}.data"], tensors[f"{name}.scale"], tensors[f"{name}.source"], layer.shape)
        for name, layer in layers.items()
    }


def write(layers: Layers, checkpoint: files.Path) -> None:
    """Keep what `layers` hold once `checkpoint` is loaded; of several processes one does. A failure is logged."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    path = _path(layers, checkpoint)
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in _tensors(layers)}
    made_from = _made_from(layers, checkpoint, _tensors(layers))
    try:
        with files.replacing(path) as temporary:
            files.write_tensors(temporary, specs, _tensors(layers), {_MADE_FROM: made_from})
    except CheckpointError as error:
        logger.warning("The quantised base is not kept: %s", error)
    else:
        logger.info("The quantised base is kept in %s", path)


def _tensors(layers: Layers) -> Iterator[tuple[str, Tensor]]:
    return ((f"{name}.{part}", getattr(layer, part)) for name, layer in layers.items() for part in _PARTS)


def _format(layers: Layers) -> str:
    return next(iter(layers.values())).name


def _path(layers: Layers, checkpoint: files.Path) -> pathlib.Path:
    checkpoint = pathlib.Path(checkpoint)
    return checkpoint.with_name(f"{checkpoint.name}.{_format(layers)}")


def _made_from(layers: Layers, checkpoint: files.Path, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of the layers, of what quantises them, of the cache's own names, dtypes and shapes, and of the
    checkpoint's size, time, header and a few bytes.
    """
    form = _format(layers)
    extra = FORMATS[form].extra
    versions = (adapters.version(), torch.__version__, extra and importlib.metadata.version(extra))
    shapes = sorted((name, layer.shape) for name, layer in layers.items())
    header = sorted((name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors)
    status = pathlib.Path(checkpoint).stat()
    digest = hashlib.sha256(repr((form, versions, shapes, header, status.st_size, status.st_mtime_ns)).encode())
    with pathlib.Path(checkpoint).open("rb") as file:
        digest.update(file.read(int.from_bytes(file.read(8), "little")))
        for sample in range(_SAMPLES):
            file.seek(status.st_size * sample // _SAMPLES)
            digest.update(file.read(64))
    return digest.hexdigest()
