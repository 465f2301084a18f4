"""The models that `--student` and `--teacher-model` name, and the weights that they start from."""

import argparse
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, get_model_weights, list_models
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from examples.detection.checkpoints import read_weights
from examples.detection.detectors import BACKBONES, STOCK, build, keep_anchors_exact
from examples.detection.detectors import COMPACT as COMPACT_DETECTORS
from examples.detection.lite0 import LAST, LITE0, start_from_imagenet
from examples.detection.processes import JobError

# Whole detectors of torchvision; those of masks and key points want other data.
BUILDERS = tuple(
    name for name in list_models(detection) if not name.startswith(("maskrcnn", "keypointrcnn"))
)
CLASSIFIERS = list_models(torchvision.models)
RESNETS = tuple(name for name in CLASSIFIERS if "resnet" in name or "resnext" in name)
MOBILENETS = tuple(name for name in CLASSIFIERS if name.startswith("mobilenet"))
COMPACT = {
    "compact": None,
    **{f"compact_{name}": name for name in BACKBONES},
    **{name: name for name in LAST},
}
NAMES = (*COMPACT, *BUILDERS, *RESNETS, *MOBILENETS)
# They take no other size.
FIXED_SIZES = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
# Of what `--detector` may be.
FAMILY = dict(zip((*COMPACT_DETECTORS, *STOCK), COMPACT_DETECTORS * 2, strict=True))
# The stages of strides 4 to 32 are 1 to 4.
FAMILIES: dict[str, tuple[Callable[..., nn.Module], list[int]]] = {
    "fcos": (FCOS, [2, 3, 4]),
    "retinanet": (RetinaNet, [2, 3, 4]),
    "faster_rcnn": (FasterRCNN, [1, 2, 3, 4]),
}
STARTS = ("none", "imagenet", "coco")
Start = str | Path


def name_of(options: argparse.Namespace, role: str) -> str:
    named: str | None = options.student if role == "student" else options.teacher_model
    return named or (options.detector if options.detector in STOCK else "compact")


def cannot_start(name: str, start: Start) -> str | None:
    """Why there are no such weights of the model, or None."""
    if isinstance(start, Path):
        return None if start.is_file() else f"must be one of {', '.join(STARTS)}, or a file"
    if start == "imagenet" and name in COMPACT and name not in LAST:
        return f"wants a model of torchvision or {LITE0}: the compact ones have no such weights"
    if start == "coco" and name not in BUILDERS:
        return f"wants a whole detector of torchvision, as {STOCK[1]}_v2"
    return None


def new_detector(options: argparse.Namespace, role: str, classes: int) -> nn.Module:
    """At its first weights; random ones depend on the seed alone, whatever was drawn before."""
    start: Start = getattr(options, f"{role}_weights")
    option = f"--{role}-weights {start}"
    torch.manual_seed(options.seed)
    name = name_of(options, role)
    try:
        model = untrained(options, role, name, classes, start)
    # Without a network; a cache that cannot be written; a file that was cut short.
    except (URLError, OSError, RuntimeError) as error:
        if start not in ("imagenet", "coco"):
            raise
        raise JobError(
            f"{option}: torchvision cannot download them ({error}): start with a network once, "
            f"or copy the file into {Path(torch.hub.get_dir(), 'checkpoints')}"
        ) from error
    if isinstance(start, Path):
        load_start(model, start, option)
    return keep_anchors_exact(model)


def untrained(
    options: argparse.Namespace, role: str, name: str, classes: int, start: Start
) -> nn.Module:
    size, family = options.size, FAMILY[options.detector]
    if name in COMPACT:
        small = options.data in ("sparse", "deeppcb") and options.tile != "full"
        model = build(family, role, classes, size, COMPACT[name], small_objects=small)
        if start == "imagenet":
            start_from_imagenet(model.backbone.body, name)
        return model
    sizes = {} if name in FIXED_SIZES else {"min_size": size, "max_size": size * 1333 // 800}
    if name in BUILDERS:
        return whole_detector(name, classes, start, sizes)
    detector, stages = FAMILIES[family]
    extra = LastLevelMaxPool() if detector is FasterRCNN else LastLevelP6P7(256, 256)
    # As torchvision does it: of pretrained networks the first stages and the statistics stay.
    weights, trained = ("DEFAULT", 3) if start == "imagenet" else (None, 5)
    make: Callable[..., Any] = resnet_fpn_backbone if name in RESNETS else mobilenet_backbone
    more = {} if name in RESNETS else {"fpn": True}
    backbone = make(
        backbone_name=name,
        weights=weights,
        norm_layer=nn.BatchNorm2d if weights is None else FrozenBatchNorm2d,
        trainable_layers=trained if name in RESNETS or weights else 6,
        returned_layers=stages,
        extra_blocks=extra,
        **more,
    )
    return detector(backbone, num_classes=classes, **sizes)


def whole_detector(name: str, classes: int, start: Start, sizes: dict[str, int]) -> nn.Module:
    builder: Callable[..., nn.Module] = getattr(detection, name)
    backbone = inspect.signature(builder).parameters["weights_backbone"].default
    first = {"weights": None, "weights_backbone": backbone if start == "imagenet" else None}
    model = builder(**first, num_classes=classes, **sizes)
    if start != "coco":
        return model
    pretrained = builder(weights=get_model_weights(builder).DEFAULT, **sizes)
    # Its classes are COCO's; what else its head knows is kept.
    place = "head" if hasattr(model, "head") else "roi_heads.box_predictor"
    head = model.get_submodule(place)
    known = pretrained.get_submodule(place).state_dict()
    head.load_state_dict(fitting(known, head.state_dict()), strict=False)
    parent, _, last = place.rpartition(".")
    setattr(pretrained.get_submodule(parent), last, head)
    return pretrained


def fitting(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k in wanted and v.shape == wanted[k].shape}


def load_start(model: nn.Module, file: Path, option: str) -> None:
    """Of a detector for other classes, all but the layers that tell them."""
    content = read_weights(file, option)
    wanted = model.state_dict()
    if not isinstance(content, dict) or content.keys() != wanted.keys():
        raise JobError(f"{option} must have the names of this model's weights, got other ones")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise JobError(f"{option} must hold tensors, got {type(value).__name__} under {name}")
    known = fitting(content, wanted)
    anew = [name for name in wanted if name not in known]
    elsewhere = [name for name in anew if not name.startswith(("head.", "roi_heads."))]
    if elsewhere:
        raise JobError(f"{option} must fit the model outside its head, got another {elsewhere[0]}")
    if unsound := [name for name, value in known.items() if not value.isfinite().all()]:
        raise JobError(f"{option} must hold finite weights, got others in {unsound[0]}")
    model.load_state_dict(known, strict=False)
    if anew:
        print(f"{option}: other classes, so that these start anew: {', '.join(anew)}")
