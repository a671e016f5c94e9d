"""Import this first where lerobot is tested beside a CPU-only torch.

A torchvision from PyPI cannot load its compiled operators there. lerobot's policies need none of them, but its import
(for data sets) insists that this one has been declared.
"""

import contextlib
import sys
import warnings

import torch

warnings.filterwarnings("ignore", message="Failed to load image Python extension")
with contextlib.suppress(ImportError):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
