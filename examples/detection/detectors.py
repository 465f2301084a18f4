"""The detectors of the main job: torchvision's own classes, compact for a show or stock."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import MobileNetV2, RegNet, detection
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import MultiScaleRoIAlign

import featkd
from examples.detection.lite0 import LAST, LITE0, NORMALIZATION, channels_of, lite0
from examples.detection.processes import JobError

COMPACT = ("fcos", "retinanet", "faster_rcnn")
# Compact too; its targets hold masks.
MASK_RCNN = "mask_rcnn"
STOCK = ("fcos_resnet50_fpn", "retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn")
# The stages of a compact ResNet that enter the FPN. See `levels_of` for others.
LEVELS = ("backbone.body.layer2", "backbone.body.layer3", "backbone.body.layer4")

# Width of the first stage, blocks a stage, and channels of the FPN and the heads.
TEACHER = (24, 1, 64)
STUDENT = (4, 1, 32)
Shape = tuple[int, int, int]


class CompactResNet(ResNet):
    """torchvision's ResNet of basic blocks, with `width` to `8 * width` channels."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1])
        self.inplanes = width
        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity()
        self.layer1 = self._make_layer(BasicBlock, width, blocks)
        self.layer2 = self._make_layer(BasicBlock, 2 * width, blocks, stride=2)
        self.layer3 = self._make_layer(BasicBlock, 4 * width, blocks, stride=2)
        self.layer4 = self._make_layer(BasicBlock, 8 * width, blocks, stride=2)


def compact_regnet() -> nn.Module:
    """torchvision's RegNetY in three stages of 16, 32 and 64 channels, 1, 2 and 4 blocks."""
    settings = BlockParams.from_init_params(
        depth=7, w_0=16, w_a=10.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    network = RegNet(settings, stem_width=8)
    return nn.Sequential(
        OrderedDict(stem=network.stem, **dict(network.trunk_output.named_children()))
    )


def compact_mobilenet() -> nn.Module:
    """The blocks of torchvision's MobileNetV2 at a third of its width, its last stride left out."""
    return MobileNetV2(width_mult=0.35).features[:14]


# By the name of a student's backbone: how to make it, and its stages at strides 4, 8 and 16 with
# their channels. They have 70,000 to 180,000 parameters.
BACKBONES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "resnet18": (lambda: CompactResNet(8, 2), {"layer2": 16, "layer3": 32, "layer4": 64}),
    "regnet": (compact_regnet, {"block1": 16, "block2": 32, "block3": 64}),
    "mobilenet": (compact_mobilenet, {"3": 8, "6": 16, "13": 32}),
}


def compact_backbone(shape: str | Shape) -> BackboneWithFPN:
    """Three FPN levels at strides 4, 8 and 16."""
    if shape in LAST:
        body, channels = lite0(shape), channels_of(shape)
        fpn = TEACHER[2] if shape == LITE0 else STUDENT[2]
    elif isinstance(shape, str):
        make, channels = BACKBONES[shape]
        body, fpn = make(), STUDENT[2]
    else:
        width, blocks, fpn = shape
        body = CompactResNet(width, blocks)
        channels = {"layer2": 2 * width, "layer3": 4 * width, "layer4": 8 * width}
    return BackboneWithFPN(
        body,
        return_layers={stage: str(level) for level, stage in enumerate(channels)},
        in_channels_list=list(channels.values()),
        out_channels=fpn,
        # No pooled fourth level: an object fills at most two thirds of the image.
        extra_blocks=NoExtraLevels(),
    )


def levels_of(model: nn.Module) -> list[str]:
    """The paths of the stages that enter the FPN; none without one."""
    body = getattr(model.backbone, "body", None)
    return [] if body is None else [f"backbone.body.{stage}" for stage in body.return_layers]


def fpn_outputs(model: nn.Module) -> list[str]:
    """The paths of what the FPN puts out for those stages."""
    return [f"backbone[{i}]" for i, _ in enumerate(levels_of(model))]


def tapped(
    student: nn.Module, teacher: nn.Module, taps: str, size: int
) -> tuple[dict[str, tuple[str, str]], list[dict[str, int]]]:
    """The levels' paths in both models, and both models' channels.

    `taps` is `"fpn"`, or `"stages"` for what enters the FPN. Levels of other models than a pair
    with one FPN are those that :func:`featkd.match_layers` finds; without an FPN, of stages.
    """
    if taps == "fpn" and (found := strides(student)) == strides(teacher) != []:
        # By their strides, as `featkd.match_layers` names them: 8 is p3.
        names = [f"p{stride.bit_length() - 1}" for stride in found]
        paths = dict(zip(names, fpn_outputs(student), strict=True))
        channels = [dict.fromkeys(paths, each.backbone.out_channels) for each in (student, teacher)]
        return {level: (path, path) for level, path in paths.items()}, channels
    match = featkd.match_layers(student, teacher, [torch.zeros(3, size, size)])
    if taps == "stages" or not match.others:
        # Without an FPN those below stride 8 are none that a head takes.
        wanted = strides(student) or [8, 16, 32]
        pairs = {**match.pairs, **match.others}
        stages = [name for name, (ours, _) in pairs.items() if ours.stage and ours.stride in wanted]
        if not stages:
            raise JobError("student and teacher must have a stage of one stride, got none to tap")
        match = match.select(*stages)
    return match.layers, [match.student_channels, match.teacher_channels]


@torch.no_grad()
def strides(model: nn.Module) -> list[int]:
    """Of what the FPN puts out for the stages; none without an FPN."""
    if not (levels := levels_of(model)):
        return []
    training = model.training
    maps = list(model.eval().backbone(torch.zeros(1, 3, 64, 64)).values())
    model.train(training)
    return [64 // maps[i].shape[-1] for i, _ in enumerate(levels)]


class NoExtraLevels(detection.backbone_utils.ExtraFPNBlock):
    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        return results, names


def build(
    name: str,
    role: str,
    classes: int,
    size: int,
    shape: str | Shape | None = None,
    small_objects: bool = False,
) -> nn.Module:
    """The detector `name` for `role`, `"teacher"` or `"student"`, at random weights.

    `classes` counts the background; `size` is the shorter side of the images inside the model;
    `shape`, a tuple or a name of `BACKBONES` or of a Lite0, stands in place of `TEACHER` or
    `STUDENT` for a compact detector. `small_objects`: a compact FCOS for objects of 12 to 28
    pixels.
    """
    if name in STOCK:
        builder: Callable[..., nn.Module] = getattr(detection, name)
        longest = size * 1333 // 800
        return builder(
            weights=None,
            weights_backbone=None,
            num_classes=classes,
            min_size=size,
            max_size=longest,
        )
    backbone = compact_backbone(shape or (TEACHER if role == "teacher" else STUDENT))
    fpn = backbone.out_channels
    sizes: dict[str, Any] = {"min_size": size, "max_size": size * 5 // 3}
    if shape in LAST:
        sizes |= NORMALIZATION
    if name == "fcos":
        # FCOS gives a level the objects of 4 to 8 times its anchor.
        widths = (1.0, 2.0, 4.0) if small_objects else (2.0, 4.0, 8.0)
        anchors = AnchorGenerator(tuple((width,) for width in widths), ((1.0,),) * 3)
        # torchvision rounds half a pixel to 0, and a level of anchors without a size finds nothing.
        anchors.cell_anchors = [
            torch.tensor([[-width, -width, width, width]]) / 2 for width in widths
        ]
        # A small object has few positions: more of them are positive examples.
        sizes["center_sampling_radius"] = 3.0 if small_objects else 1.5
        head = FCOSHead(fpn, 1, classes, num_convs=2)
        draw_towers(head)
        sizes["score_thresh"] = 0.05
        return FCOS(backbone, classes, anchor_generator=anchors, head=head, **sizes)
    octaves = tuple((s, s * 2 ** (1 / 2)) for s in (10.0, 20.0, 40.0))
    if name == "retinanet":
        anchors = AnchorGenerator(octaves, ((0.5, 1.0, 2.0),) * 3)
        head = RetinaNetHead(fpn, anchors.num_anchors_per_location()[0], classes)
        shorten_towers(head)
        draw_towers(head)
        return RetinaNet(backbone, classes, anchor_generator=anchors, head=head, **sizes)
    anchors = AnchorGenerator(octaves, ((0.5, 1.0, 2.0),) * 3)
    masks: dict[str, Any] = {}
    if name == MASK_RCNN:
        masks = {
            "mask_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], output_size=10, sampling_ratio=2),
            "mask_head": MaskRCNNHeads(fpn, (fpn, fpn), 1),
            "mask_predictor": MaskRCNNPredictor(fpn, fpn, classes),
        }
    return (MaskRCNN if masks else FasterRCNN)(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(fpn, anchors.num_anchors_per_location()[0]),
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=100,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], output_size=5, sampling_ratio=2),
        box_head=detection.faster_rcnn.TwoMLPHead(fpn * 25, 2 * fpn),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(2 * fpn, classes),
        box_batch_size_per_image=64,
        **masks,
        **sizes,
    )


def keep_anchors_exact(model: nn.Module) -> nn.Module:
    """torchvision makes anchors of the features' type; bfloat16 knows no odd number over 256."""
    for module in model.modules():
        if isinstance(module, (AnchorGenerator, DefaultBoxGenerator)):
            module.register_forward_pre_hook(with_float32_maps)
    return model


def with_float32_maps(_: nn.Module, inputs: tuple[Any, list[Tensor]]) -> tuple[Any, list[Tensor]]:
    images, maps = inputs
    return images, [each.float() for each in maps]


def shorten_towers(head: RetinaNetHead) -> None:
    """Two convolutions a tower; torchvision's four are not to be chosen."""
    for branch in (head.classification_head, head.regression_head):
        branch.conv = branch.conv[:2]


def draw_towers(head: nn.Module) -> None:
    """torchvision draws the towers for fine-tuning, at 0.01; from nothing He's start is faster."""
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == layer.out_channels:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
