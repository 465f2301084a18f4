"""Public detectors and backbones with random weights, and where they are tapped.

The models are those that a user meets, built by their packages' own builders and configurations;
small are the images (64 x 96 pixels), what torchvision's builders let one set, and the
configurations of Hugging Face's models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection

from featkd import from_channels_last, from_tokens
from tests.helpers.tensors import normal

IMAGES = normal(2, 3, 64, 96, dtype=torch.float32).sigmoid()
BOXES = torch.tensor([[4.0, 6.0, 40.0, 50.0], [30.0, 10.0, 90.0, 60.0]])
CLASSES = 3


@dataclass(frozen=True)
class Entry:
    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    """One training step's arguments; the images come first."""
    layers: Mapping[str, str]
    """Level -> the path that is tapped; all lie in the body."""
    stages: Mapping[str, str]
    """Level -> the path that `match_layers` is to find, for every level up to C5 that it finds."""
    pyramid: Mapping[str, str] = field(default_factory=dict)
    """Likewise for what its FPN puts out."""
    body: str = ""
    """The part that the wrappers are tried on; it takes `IMAGES`."""
    part: str = ""
    """The part of the body that is compiled and exported, likewise."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """One training step's keyword arguments."""
    convert: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    shared_input: str | None = None
    size: tuple[int, int] = (64, 96)
    """What the model makes of the images' height and width."""

    def layers_of(self, part: str) -> dict[str, str]:
        prefix = f"{part}." if part else ""
        return {level: path.removeprefix(prefix) for level, path in self.layers.items()}


def numbered(pattern: str, names: Any, first: int = 2) -> dict[str, str]:
    return {f"c{level}": pattern.format(name) for level, name in enumerate(names, first)}


def from_c3(stages: Mapping[str, str]) -> dict[str, str]:
    return {level: path for level, path in stages.items() if level in ("c3", "c4", "c5")}


# --- torchvision's detection builders -------------------------------------------------------------

SMALL = {"min_size": 64, "max_size": 96}
FEW_PROPOSALS = SMALL | {
    **dict.fromkeys(("rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test"), 16),
    **dict.fromkeys(("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test"), 8),
    "box_batch_size_per_image": 8,
    "box_detections_per_img": 2,
}


def target(**more: Tensor) -> dict[str, Tensor]:
    return {"boxes": BOXES, "labels": torch.tensor([1, 2])} | more


def torchvision_entry(
    name: str,
    stages: Mapping[str, str],
    options: Mapping[str, Any],
    *,
    body: str = "backbone",
    layers: Mapping[str, str] | None = None,
    pyramid: Mapping[str, str] | None = None,
    size: tuple[int, int] = (64, 96),
    **annotations: Tensor,
) -> Entry:
    return Entry(
        partial(
            getattr(detection, name),
            weights=None,
            weights_backbone=None,
            num_classes=CLASSES,
            **options,
        ),
        (list(IMAGES), [target(**annotations)] * len(IMAGES)),
        layers or from_c3(stages),
        stages,
        pyramid or {},
        body,
        body,
        shared_input="backbone",
        size=size,
    )


RESNET = numbered("backbone.body.layer{}", (1, 2, 3, 4)) | {"c1": "backbone.body.relu"}
MOBILENET = numbered("backbone.body.{}", (1, 3, 6, 12, 16), 1)
MASKS = torch.zeros(2, 64, 96, dtype=torch.uint8)
MASKS[:, 10:40, 30:60] = 1
KEYPOINTS = torch.tensor([20.0, 30.0, 1.0]).expand(2, 17, 3)


def outputs(keys: Any, first: int, path: str = "backbone") -> dict[str, str]:
    return {f"p{level}": f"{path}[{key}]" for level, key in enumerate(keys, first)}


P2_TO_P6 = outputs(("0", "1", "2", "3", "pool"), 2)
# Of images this small p7 is as high as p6: one position.
P3_TO_P6 = outputs(("0", "1", "2", "p6"), 3)
P5_AND_P6 = outputs(("1", "pool"), 5)

TORCHVISION = {
    name: torchvision_entry(name, stages, options, pyramid=pyramid, **annotations)
    for name, stages, pyramid, options, annotations in [
        ("fasterrcnn_resnet50_fpn", RESNET, P2_TO_P6, FEW_PROPOSALS, {}),
        ("fasterrcnn_resnet50_fpn_v2", RESNET, P2_TO_P6, FEW_PROPOSALS, {}),
        ("fasterrcnn_mobilenet_v3_large_fpn", MOBILENET, P5_AND_P6, FEW_PROPOSALS, {}),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", MOBILENET, P5_AND_P6, FEW_PROPOSALS, {}),
        ("maskrcnn_resnet50_fpn", RESNET, P2_TO_P6, FEW_PROPOSALS, {"masks": MASKS}),
        ("maskrcnn_resnet50_fpn_v2", RESNET, P2_TO_P6, FEW_PROPOSALS, {"masks": MASKS}),
        ("keypointrcnn_resnet50_fpn", RESNET, P2_TO_P6, FEW_PROPOSALS, {"keypoints": KEYPOINTS}),
        ("retinanet_resnet50_fpn", RESNET, P3_TO_P6, SMALL, {}),
        ("retinanet_resnet50_fpn_v2", RESNET, P3_TO_P6, SMALL, {}),
        ("fcos_resnet50_fpn", RESNET, P3_TO_P6, SMALL, {}),
    ]
} | {
    # These two have images of a fixed size.
    "ssd300_vgg16": torchvision_entry(
        "ssd300_vgg16",
        numbered(
            "backbone.{}", ("features.8", "features.15", "features.22", "extra.0", "extra.1"), 1
        ),
        {},
        size=(300, 300),
        body="backbone.features",
        layers={"c2": "backbone.features.15", "c3": "backbone.features.22"},
    ),
    "ssdlite320_mobilenet_v3_large": torchvision_entry(
        "ssdlite320_mobilenet_v3_large",
        numbered("backbone.features.{}", ("0.1", "0.3", "0.6", "0.13", "1"), 1),
        {},
        size=(320, 320),
        layers={"c3": "backbone.features.0.6", "c4": "backbone.features.0.12"},
    ),
}


# --- Hugging Face's detectors ---------------------------------------------------------------------

WIDTHS = [8, 16, 16, 32]
TRANSFORMER = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 16,
    "decoder_attention_heads": 2,
    "num_queries": 5,
    "num_labels": CLASSES,
    "dropout": 0.0,
}
HYBRID = TRANSFORMER | {
    "encoder_in_channels": WIDTHS[1:],
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32] * 3,
    "num_denoising": 0,
}
RESNET_CONFIG = {
    "embedding_size": 8,
    "hidden_sizes": WIDTHS,
    "depths": [1] * 4,
    "layer_type": "basic",
}
HGNET_CONFIG = {
    "stem_channels": [3, 8, 8],
    "embedding_size": 8,
    "hidden_sizes": WIDTHS,
    "depths": [1] * 4,
    "stage_in_channels": [8, *WIDTHS[:-1]],
    "stage_mid_channels": [8] * 4,
    "stage_out_channels": WIDTHS,
    "stage_num_blocks": [1] * 4,
    "stage_numb_of_layers": [1] * 4,
}
VIT_CONFIG = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LABELS = [
    {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.3, 0.4, 0.3, 0.4]] * 2)}
] * len(IMAGES)


def hf(kind: str, config: Mapping[str, Any], backbone: str = "", **of_backbone: Any) -> nn.Module:
    """A detector with no convolution frozen; `of_backbone` configures its backbone."""
    import transformers

    if backbone:
        part = getattr(transformers, f"{backbone}Config")(**of_backbone)
        config = {**config, "backbone_config": part}
    model = getattr(transformers, f"{kind}ForObjectDetection")(
        getattr(transformers, f"{kind}Config")(**config)
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # DETR comes with its backbone frozen; D-FINE's, as it starts, loses all scale.
            module.requires_grad_(True)
            nn.init.kaiming_normal_(module.weight)
    return model


def hf_entry(
    kind: str,
    config: Mapping[str, Any],
    backbone: str,
    of_backbone: Mapping[str, Any],
    encoder: str = "model.backbone.model",
    pyramid: str = "",
) -> Entry:
    """A detector on a convolutional backbone, which lies at the path `encoder`."""
    stem = "embedder.pool" if backbone == "HGNetV2" else "embedder.embedder"
    stages = numbered(encoder + ".encoder.stages.{}", range(4)) | {"c1": f"{encoder}.{stem}"}
    return Entry(
        partial(hf, kind, config, backbone, **of_backbone),
        (IMAGES,),
        from_c3(stages),
        stages,
        outputs(range(3), 3, pyramid) if pyramid else {},
        part=encoder,
        options={"labels": LABELS},
    )


C5 = RESNET_CONFIG | {"out_features": ["stage4"]}
C3_TO_C5 = {"out_features": ["stage2", "stage3", "stage4"]}
RESNET_C3_TO_C5 = RESNET_CONFIG | C3_TO_C5
HGNET_C3_TO_C5 = HGNET_CONFIG | C3_TO_C5
DAB = {name: value for name, value in TRANSFORMER.items() if name != "d_model"}
DAB |= {"hidden_size": TRANSFORMER["d_model"]}
RF = {
    "d_model": 32,
    "decoder_ffn_dim": 16,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_queries": 5,
    "group_detr": 1,
    "num_labels": CLASSES,
    "dropout": 0.0,
}
DINOV2 = VIT_CONFIG | {
    "image_size": 32,
    "patch_size": 16,
    "num_windows": 1,
    "out_indices": [1, 2],
}
YOLOS = VIT_CONFIG | {
    "intermediate_size": 16,
    "image_size": [64, 96],
    "num_detection_tokens": TRANSFORMER["num_queries"],
    "num_labels": CLASSES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

HYBRID_ENCODER = "model.encoder[last_hidden_state]"

TRANSFORMERS = {
    "detr": hf_entry("Detr", TRANSFORMER, "ResNet", C5),
    "conditional_detr": hf_entry("ConditionalDetr", TRANSFORMER, "ResNet", C5),
    "deformable_detr": hf_entry("DeformableDetr", TRANSFORMER, "ResNet", RESNET_C3_TO_C5),
    "dab_detr": hf_entry("DabDetr", DAB, "ResNet", C5, "model.backbone.conv_encoder.model"),
    "rt_detr": hf_entry("RTDetr", HYBRID, "RTDetrResNet", RESNET_C3_TO_C5, pyramid=HYBRID_ENCODER),
    "rt_detr_v2": hf_entry(
        "RTDetrV2", HYBRID, "RTDetrResNet", RESNET_C3_TO_C5, pyramid=HYBRID_ENCODER
    ),
    "d_fine": hf_entry("DFine", HYBRID, "HGNetV2", HGNET_C3_TO_C5, pyramid=HYBRID_ENCODER),
    "deimv2": hf_entry(
        "Deimv2",
        HYBRID,
        "HGNetV2",
        HGNET_C3_TO_C5,
        "model.conv_encoder.model",
        "model.encoder[feature_maps]",
    ),
    "rf_detr": Entry(
        partial(hf, "RfDetr", RF, "RfDetrDinov2", **DINOV2),
        (IMAGES,),
        {"c4": "model.backbone.projector"},
        {"c4": "model.backbone.backbone[feature_maps][1]"},
        options={"labels": LABELS},
    ),
    "yolos": Entry(
        partial(hf, "Yolos", YOLOS),
        (IMAGES,),
        {"first": "vit.encoder.layer.0", "c4": "vit.encoder.layer.1"},
        {"c4": "vit.embeddings.patch_embeddings.projection"},
        options={"labels": LABELS},
        convert=dict.fromkeys(
            ("first", "c4"),
            partial(from_tokens, size=(4, 6), prefix=1, suffix=TRANSFORMER["num_queries"]),
        ),
    ),
}


# --- timm's backbones -----------------------------------------------------------------------------


def backbone(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def timm_entry(name: str, stages: Mapping[str, str], layers: Any = None, **options: Any) -> Entry:
    convert = options.pop("convert", {})
    build = partial(backbone, name, **options)
    return Entry(build, (IMAGES,), layers or from_c3(stages), stages, convert=convert)


def features(name: str, pattern: str, names: Any, stem: str = "", **options: Any) -> Entry:
    stages = numbered(pattern, names) | ({"c1": stem} if stem else {})
    return timm_entry(name, stages, features_only=True, **options)


TIMM = {
    "resnet18": features("resnet18", "layer{}", (1, 2, 3, 4), "act1"),
    "regnetx_002": features("regnetx_002", "s{}", (1, 2, 3, 4), "stem"),
    "convnext_atto": features("convnext_atto", "stages_{}", range(4)),
    "efficientnet_b0": features("efficientnet_b0", "blocks.{}", (1, 2, 4, 6), "blocks.0"),
    "mobilenetv3_small_050": features("mobilenetv3_small_050", "blocks.{}", (0, 1, 3, 5), "act1"),
    "swin_tiny_patch4_window7_224": features(
        "swin_tiny_patch4_window7_224",
        "layers_{}",
        range(4),
        img_size=(64, 96),
        drop_path_rate=0.0,
        convert=dict.fromkeys(("c3", "c4", "c5"), from_channels_last),
    ),
    "vit_tiny_patch16_224": timm_entry(
        "vit_tiny_patch16_224",
        {"c4": "patch_embed.proj"},
        {"middle": "blocks.5", "c4": "blocks.11"},
        img_size=(64, 96),
        num_classes=0,
        convert=dict.fromkeys(("middle", "c4"), partial(from_tokens, size=(4, 6), prefix=1)),
    ),
}

ZOO = TORCHVISION | TRANSFORMERS | TIMM

# Teacher and student.
CROSS_PAIRS = [
    ("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"),
    ("fasterrcnn_resnet50_fpn", "mobilenetv3_small_050"),
    ("maskrcnn_resnet50_fpn", "fcos_resnet50_fpn"),
    ("keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn"),
    ("vit_tiny_patch16_224", "retinanet_resnet50_fpn"),
    ("vit_tiny_patch16_224", "resnet18"),
    ("swin_tiny_patch4_window7_224", "fcos_resnet50_fpn"),
    ("swin_tiny_patch4_window7_224", "fasterrcnn_mobilenet_v3_large_fpn"),
    ("swin_tiny_patch4_window7_224", "rt_detr"),
    ("convnext_atto", "d_fine"),
]

# (model, column) -> why the cell has no test: the model without a tap cannot do it either.
NOT_SUPPORTED = {
    ("rf_detr", "pickle"): (
        "Hugging Face's RF-DETR cannot be pickled: it holds a local function as a hook"
    ),
}
