"""torchvision, which timm and Transformers import: its wheel does not load its operators beside torch for CPU alone.

It then fails where it describes two of them that nobody calls here; they need only be known by name.
"""

import torch
from torch import library as operators

try:
    import torchvision  # noqa: F401
except RuntimeError:
    fragment = operators.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
