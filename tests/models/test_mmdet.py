"""The paper's own detectors in mmdet, the framework it used: every one tapped, matched, distilled.

The models are those of the configs in the mmdet package, with random weights, on two images of
128 x 160 pixels (SSD300: 300 x 300). `.ci/mmdet` makes the environment and runs this file.
"""

import copy
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from featkd import Distiller, FeatureDistillationLoss, FeatureTap, match_layers
from tests.helpers.models import hook_count, snapshot, unchanged, watch

pytestmark = [
    pytest.mark.mmdet,
    pytest.mark.filterwarnings("ignore:pkg_resources is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*TorchScript. support for func:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*has been moved to ..mmcv:ImportWarning"),
    pytest.mark.filterwarnings("ignore:DeprecationWarning. pos_bboxes is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid. in an upcoming release:UserWarning"),
]

# The teacher is the student's config with this backbone, whose batch norms would drift in training.
R101 = {"depth": 101, "norm_eval": False}
X101 = {"type": "ResNeXt", "groups": 32, "base_width": 4, **R101}
D53 = {"norm_eval": False}
CONFIGS = {
    "Faster R-CNN R50 from R101": ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco", R101),
    "Cascade R-CNN R50 from X101": ("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco", X101),
    "Dynamic R-CNN R50 from R101": ("dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco", R101),
    "Grid R-CNN R50 from X101": ("grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco", X101),
    "Mask R-CNN R50 from R101": ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco", R101),
    "Cascade Mask R-CNN R50 from X101": ("cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco", X101),
    "RetinaNet R50 from X101": ("retinanet/retinanet_r50_fpn_1x_coco", X101),
    "FSAF R50 from R101": ("fsaf/fsaf_r50_fpn_1x_coco", R101),
    "RepPoints R50 from R101": ("reppoints/reppoints-moment_r50_fpn_1x_coco", R101),
    "YOLOv3 D53 from D53": ("yolo/yolov3_d53_8xb8-320-273e_coco", D53),
    "SSD300 VGG16 from VGG16": ("ssd/ssd300_coco", {}),
}
RESNETS = [name for name in CONFIGS if "R50" in name]


def stages(pattern, names):
    """Level -> path, from stride 2 on."""
    return {f"c{index}": pattern.format(name) for index, name in enumerate(names, 1)}


RESNET = stages("backbone.{}", ("relu", "layer1", "layer2", "layer3", "layer4"))
STAGES = dict.fromkeys(RESNETS, RESNET) | {
    "YOLOv3 D53 from D53": stages("backbone.conv_res_block{}", (1, 2, 3, 4, 5)),
    "SSD300 VGG16 from VGG16": stages("backbone.features.{}", (8, 15, 22, 34)),
}
# Tapped levels by name, and their channels.
RESNET_LEVELS = {"c3": 512, "c4": 1024}
LEVELS = dict.fromkeys(RESNETS, RESNET_LEVELS) | {
    "YOLOv3 D53 from D53": {"c5": 1024},
    "SSD300 VGG16 from VGG16": {"c3": 512, "c4": 1024},
}
# What the student trains up to the last tap; mmdet freezes the first stages of its ResNets.
UP_TO = dict.fromkeys(CONFIGS, ("student.backbone.",)) | dict.fromkeys(
    RESNETS, ("student.backbone.layer2.", "student.backbone.layer3.")
)


def build(config, **backbone):
    from mmdet.registry import MODELS
    from mmengine.hub import get_config
    from mmengine.registry import init_default_scope

    init_default_scope("mmdet")
    settings = get_config(f"mmdet::{config}.py").model
    settings.backbone.update(init_cfg=None, **backbone)
    if "rpn_head" in settings:  # fewer regions, for speed
        stage = settings.train_cfg.rcnn
        for one in stage if isinstance(stage, list) else [stage]:
            one.sampler.num = 16
        settings.test_cfg.rpn.max_per_img = 16
    model = MODELS.build(settings)
    # Not the backbone: mmdet starts it with residual blocks of zero, which pass no gradient.
    for name, part in model.named_children():
        if name not in ("backbone", "data_preprocessor"):
            part.init_weights()
    return model


def packed(name):
    """A batch as mmdet's data loader gives it: uint8 images, boxes, labels and masks."""
    from mmdet.testing import demo_mm_inputs

    shape = (3, 300, 300) if name.startswith("SSD") else (3, 128, 160)
    return demo_mm_inputs(2, [shape, shape], with_mask="Mask" in name)


@pytest.fixture(scope="session", autouse=True)
def what_the_matrix_says_beside_the_results(record_testsuite_property):
    for package in ("torch", "torchvision", "mmengine", "mmcv", "mmdet"):
        record_testsuite_property(package, version(package))
    for name in CONFIGS:
        if name not in RESNETS:
            reason = "mmdet checkpoints ResNets only: Darknet and SSDVGG take no `with_cp`"
            record_testsuite_property(f"test_checkpoint[{name}]", reason)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """Student and teacher, what to tap in both, and a batch as `model(*batch, mode=...)` takes it.

    Tests that train or tap for good take copies.
    """
    torch.manual_seed(0)
    name = request.param
    config, backbone = CONFIGS[name]
    student, teacher = build(config).train(), build(config, **backbone)
    batch = student.data_preprocessor(packed(name), True)
    return SimpleNamespace(
        name=name,
        student=student,
        teacher=teacher,
        layers={level: STAGES[name][level] for level in LEVELS[name]},
        batch=(batch["inputs"], batch["data_samples"]),
    )


def make(pair):
    channels = LEVELS[pair.name]
    loss = FeatureDistillationLoss(channels, channels)
    student, teacher = copy.deepcopy((pair.student, pair.teacher))
    return Distiller(student, teacher, loss, pair.layers, shared_input="backbone")


def distilled(distiller):
    """The distiller as a model of mmengine, for its runner and its optimizer wrapper."""
    from mmengine.model import BaseModel

    class Distilled(BaseModel):
        def __init__(self):
            super().__init__(data_preprocessor=distiller.student.data_preprocessor)
            self.distiller = distiller

        def forward(self, inputs, data_samples=None, mode="tensor"):
            if mode != "loss":
                return self.distiller.student(inputs, data_samples, mode=mode)
            output, losses = self.distiller(inputs, data_samples, mode="loss")
            return output | losses

    return Distilled()


@pytest.fixture(scope="module")
def trained(pair):
    """Three steps as mmengine's runner takes them, and how the models were before."""
    from mmengine.optim import OptimWrapper

    distiller = make(pair)
    model = distilled(distiller)
    before = snapshot(distiller.student), snapshot(distiller.teacher)
    optimizer = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-5))
    logs = [model.train_step(packed(pair.name), optimizer) for _ in range(3)]
    return SimpleNamespace(distiller=distiller, before=before, logs=logs)


def test_values(pair):
    tap = FeatureTap(pair.student, pair.layers)
    with tap, watch(pair.student, pair.layers.values()) as expected:
        pair.student(*pair.batch, mode="loss")
        features = tap.pop()
    for level, path in pair.layers.items():
        assert features[level].shape[1] == LEVELS[pair.name][level]
        assert torch.equal(features[level], expected[path])


def test_gradient(pair):
    distiller = make(pair)
    _, losses = distiller(*pair.batch, mode="loss")
    sum(losses.values()).backward()
    trained = {name: value for name, value in distiller.named_parameters() if value.requires_grad}
    up_to = [name for name in trained if name.startswith(("loss.", *UP_TO[pair.name]))]
    assert [name for name, value in trained.items() if value.grad is not None] == up_to
    assert all(trained[name].grad.abs().sum() > 0 for name in up_to)
    assert any(name.startswith("loss.") for name in up_to)


def test_teacher(trained):
    teacher, (_, before) = trained.distiller.teacher, trained.before
    assert unchanged(teacher, before)
    assert not any(module.training for module in teacher.modules())
    assert all(value.grad is None for value in teacher.parameters())


def test_state_dict(pair):
    student = copy.deepcopy(pair.student)
    hooks, before = hook_count(student), snapshot(student)
    loss = FeatureDistillationLoss(LEVELS[pair.name], LEVELS[pair.name])
    distiller = Distiller(student, pair.teacher, loss, pair.layers, shared_input="backbone").eval()
    with torch.no_grad():
        distiller(*pair.batch)
    assert unchanged(student, before)
    ours = [f"student.{name}" for name in before] + [f"loss.{name}" for name in loss.state_dict()]
    assert list(distiller.state_dict()) == ours
    del distiller
    assert hook_count(student) == hooks


def test_distills(trained):
    for log in trained.logs:
        terms = {name: value for name, value in log.items() if "loss" in name}
        assert all(value.isfinite() for value in terms.values())
        total = terms.pop("loss")
        torch.testing.assert_close(sum(terms.values()), total)
    first, *_, last = (log["loss_attention_masked"] for log in trained.logs)
    assert last < first
    student, (before, _) = trained.distiller.student, trained.before
    for name, value in student.backbone.named_parameters(prefix="backbone"):
        assert torch.equal(value, before[name]) != value.requires_grad, name


def test_match_layers(pair):
    match = match_layers(pair.student, pair.teacher, *pair.batch)
    expected = STAGES[pair.name]
    if pair.name in RESNETS:
        assert all(path.startswith("neck[") for paths in match.layers.values() for path in paths)
    proposed = {**match.pairs, **match.others}
    stages = {level: ours.path for level, (ours, _) in proposed.items() if level.startswith("c")}
    assert stages == expected
    found = match.select(*LEVELS[pair.name])
    assert found.student_channels == found.teacher_channels == LEVELS[pair.name]
    assert all(ours.stride == 2 ** int(level[1:]) for level, (ours, _) in proposed.items())


@pytest.mark.parametrize("pair", RESNETS, indirect=True)
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # torch 2.4's own
def test_checkpoint(pair):
    """mmdet's `with_cp` recomputes every block, reentrantly."""
    plain = make(pair)
    distiller = copy.deepcopy(plain)
    for module in distiller.student.backbone.modules():
        if hasattr(module, "with_cp"):
            module.with_cp = True
    for model in (plain, distiller):
        sum(model(*pair.batch, mode="loss")[1].values()).backward()
    for ours, expected in zip(distiller.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (expected.grad is None)
        if ours.grad is not None:
            assert torch.equal(ours.grad, expected.grad)
    inside = FeatureTap(distiller.student, ["backbone.layer3.1.conv2"])
    with inside:
        distiller.student(*pair.batch, mode="loss")
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            inside.pop()


def test_ema(pair):
    from mmengine.model import ExponentialMovingAverage

    student = copy.deepcopy(pair.student)
    tap = FeatureTap(student, pair.layers)
    average = ExponentialMovingAverage(student)
    with tap:
        average.module.extract_feat(pair.batch[0])
        with pytest.raises(RuntimeError, match="got 0"):
            tap.pop()
        student.extract_feat(pair.batch[0])
        assert tap.pop().keys() == pair.layers.keys()
    names = list(pair.student.state_dict())
    assert list(average.state_dict()) == ["steps", *(f"module.{name}" for name in names)]
