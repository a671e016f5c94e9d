"""For lerobot beside a CPU-only torch: `PYTHONPATH=tests python -m pytest -p cpu_torchvision tests/test_lerobot.py`.

A torchvision from PyPI cannot load its compiled operators there. lerobot's policies need none of them, but importing
torchvision, which lerobot does for its data sets and transformers for its image processors, insists on this one.
"""

import torch

torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
