"""Image features of a frozen vision tower, compiled: its elementwise parts cost as much as its GEMMs otherwise."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("openpi_lora_patch")

_failed = False


def features(model: Any, image: Tensor) -> Tensor:
    """`model.get_image_features(image)`, (batch, patches, hidden), compiled where that works here.

    Args:
        model: a `PaliGemmaModel` whose vision tower and projector are frozen.
        image: (batch, 3, height, width) in [-1, 1].
    """
    global _failed
    if not _failed:
        try:
            return _compiled()(model, image)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            _failed = True
            logger.warning("The vision tower is not compiled: %s: %s", type(error).__name__, str(error)[:200])
    return _features(model, image)


def _features(model: Any, image: Tensor) -> Tensor:
    return model.get_image_features(image)


@functools.cache
def _compiled() -> Any:
    return torch.compile(_features, dynamic=False)
