"""Small models, inputs and hooks for the tests of taps, distiller and matching."""

import io
import re
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torchvision.models import detection

from featkd import FeatureDistillationLoss, Hyperparameters
from tests.helpers.tensors import normal

# All three terms near 1 whatever the model, so that no gradient drowns in another.
NORMALIZED = Hyperparameters(alpha=1.0, beta=1.0, gamma=1.0, temperature=0.5, normalize=True)
LEVELS = {"c1": "backbone.c1", "c2": "backbone.c2"}


def block(in_channels, out_channels, inplace):
    parts = {
        "conv": nn.Conv2d(in_channels, out_channels, 3, 2, 1),
        "norm": nn.BatchNorm2d(out_channels),
        "relu": nn.ReLU(inplace=inplace),
    }
    return nn.Sequential(OrderedDict(parts))


class Net(nn.Module):
    """A backbone with stages of stride 2 and 4, and a head, in float64."""

    def __init__(self, width=4, *, inplace=True):
        super().__init__()
        stages = {"c1": block(3, width, inplace), "c2": block(width, 2 * width, inplace)}
        self.backbone = nn.Sequential(OrderedDict(stages))
        self.head = nn.Conv2d(2 * width, 5, 1)
        self.double()

    def forward(self, images):
        return self.head(self.backbone(images))


def images(batch=2, seed=0):
    return normal(batch, 3, 16, 24, seed=seed)


def distillation_loss(student=4, teacher=6, hyperparameters=NORMALIZED):
    """For a student and a teacher `Net` of these widths, tapped at `LEVELS`."""
    ours, theirs = ({"c1": width, "c2": 2 * width} for width in (student, teacher))
    return FeatureDistillationLoss(ours, theirs, hyperparameters=hyperparameters).double()


# --- errors ---------------------------------------------------------------------------------------

TEXT = re.compile(r"`.+` must .+, got .+", re.DOTALL)


def raises(error, call, *mentions):
    """`call` raises exactly `error`, worded by the rule, and mentions the given texts."""
    with pytest.raises(error, match=TEXT) as caught:
        call()
    assert caught.type is error
    for mention in mentions:
        assert mention in str(caught.value)


# --- what is left of a model, and what a tap must equal -------------------------------------------


@contextmanager
def watch(model, paths):
    """What the modules at `paths` put out inside the block, by the plainest of hooks.

    The items of an output that is no tensor are found at `path[key]`, or `path[key][key]`.
    """
    features = {}

    def keep(path):
        def hook(module, args, output):
            keep_items(path, output)

        return hook

    def keep_items(path, value):
        if isinstance(value, torch.Tensor):
            features[path] = value.clone()
        elif isinstance(value, Mapping):
            for key, item in value.items():
                keep_items(f"{path}[{key}]", item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                keep_items(f"{path}[{index}]", item)

    modules = dict(model.named_modules(remove_duplicate=False))
    names = {path.partition("[")[0] for path in paths}
    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    yield features
    for handle in handles:
        handle.remove()


def plain_hooks(model, paths, call):
    """What `watch` finds during `call()`."""
    with watch(model, paths) as features:
        call()
    return features


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return list(after) == list(before) and all(map(torch.equal, after.values(), before.values()))


# --- real detectors, with random weights ----------------------------------------------------------

DETECTORS = {
    "fasterrcnn": detection.fasterrcnn_resnet50_fpn,
    "mobilenet": detection.fasterrcnn_mobilenet_v3_large_320_fpn,
    "retinanet": detection.retinanet_resnet50_fpn,
    "fcos": detection.fcos_resnet50_fpn,
    "ssd": detection.ssd300_vgg16,
    "ssdlite": detection.ssdlite320_mobilenet_v3_large,
}


def detector(name, **options):
    """At 64 x 96 pixels, but for the two whose size is fixed."""
    sizes = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 96}
    settings = {"weights": None, "weights_backbone": None, "num_classes": 4} | sizes | options
    return DETECTORS[name](**settings)


def detector_images():
    return [normal(3, 64, 96, seed=seed, dtype=torch.float32).sigmoid() for seed in (1, 2)]


def detector_targets():
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [30.0, 10.0, 90.0, 60.0]])
    return [{"boxes": boxes, "labels": torch.tensor([1, 3])} for _ in range(2)]


# transformers and timm take seconds to import: only where they are used.


def timm_backbone(name):
    import timm

    return timm.create_model(name, pretrained=False, features_only=True)


def detr(*widths):
    """DETR on a ResNet with stages of these widths."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=widths,
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage4"],
    )
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        **_transformer(),
    )
    return DetrForObjectDetection(config)


def rt_detr(*widths):
    """RT-DETR on a ResNet with stages of these widths."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=widths,
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=widths[1:],
        encoder_hidden_dim=16,
        decoder_in_channels=[16] * 3,
        num_denoising=0,
        **_transformer(),
    )
    return RTDetrForObjectDetection(config)


def _transformer():
    return {
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_layers": 1,
        "decoder_ffn_dim": 16,
        "decoder_attention_heads": 2,
        "num_queries": 5,
        "num_labels": 3,
    }


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
