"""The examples of a distiller in other people's training code, run as a person starts them."""

import copy
import importlib
import io
import math
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import featkd
from examples.detection.scenes import CLASSES
from tests.helpers.models import LEVELS, Net, distillation_loss, images
from tests.helpers.zoo import HGNET_C3_TO_C5, HYBRID, RESNET_C3_TO_C5, TRANSFORMER, WIDTHS, hf

STEPS = 3
# What each is started with beside the steps, and the checkpoint that it leaves.
CHECKPOINTS = {
    "plain_loop": (["--checkpoint", "plain.pt"], "plain.pt"),
    "lightning_module": (["--checkpoint", "lightning.ckpt"], "lightning.ckpt"),
    "hf_trainer": (["--output", "hf"], f"hf/checkpoint-{STEPS}/model.safetensors"),
    "torchvision_reference": (["--output-dir", "."], "model_0.pth"),
    "vit_teacher": (["--checkpoint", "vit.pt"], "vit.pt"),
}
DISTILLATION = {"loss_attention_transfer", "loss_attention_masked", "loss_non_local"}

pytestmark = [
    pytest.mark.slow,
    # Lightning walks its loaders by a class that newer versions of torch call deprecated.
    pytest.mark.filterwarnings(
        r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"
    ),
    # Lightning advises more workers on a machine with more cores.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*:UserWarning"),
    # Hugging Face's Trainer asks for pinned memory where there is no GPU, too.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


@dataclass
class Run:
    """One example from start to end."""

    name: str
    folder: Path
    output: str
    start: featkd.Distiller
    end: featkd.Distiller
    teacher_calls: int

    def checkpoint(self) -> dict[str, Tensor]:
        file = self.folder / CHECKPOINTS[self.name][1]
        match self.name:
            case "plain_loop" | "vit_teacher":
                return torch.load(file, weights_only=True)["distiller"]
            case "lightning_module":
                state = torch.load(file, weights_only=True)["state_dict"]
                return {key.removeprefix("distiller."): value for key, value in state.items()}
            case "hf_trainer":
                return load_file(file)
        return torch.load(file, weights_only=True)["model"]


def start(name: str, folder: Path, *arguments: str) -> Run:
    """Runs the example in `folder`, and counts the calls of the part of the teacher that runs."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        example = importlib.import_module(f"examples.{name}")
        build = example.build_distiller

        def build_and_count(*options: object) -> featkd.Distiller:
            distiller = build(*options)
            part = distiller.teacher.get_submodule(distiller.shared_input[1])
            part.register_forward_hook(lambda *_: calls.append(name))
            return distiller

        torch.manual_seed(0)
        before = build()
        patch.setattr(example, "build_distiller", build_and_count)
        with redirect_stdout(io.StringIO()) as output:
            after = example.main(list(arguments))
    return Run(name, folder, output.getvalue(), before, after.cpu(), len(calls))


@pytest.fixture(scope="module", params=CHECKPOINTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    options, _ = CHECKPOINTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return start(request.param, folder, "--steps", str(STEPS), *options)


def unmoved(before: nn.Module, after: nn.Module) -> list[str]:
    ended = dict(after.named_parameters())
    trained = {name: value for name, value in before.named_parameters() if value.requires_grad}
    return [name for name, value in trained.items() if torch.equal(value, ended[name])]


def differences(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> set[str]:
    """The keys that one has alone or that hold other values."""
    both = ours.keys() & expected.keys()
    return (ours.keys() ^ expected.keys()) | {
        key for key in both if not torch.equal(ours[key].cpu(), expected[key].cpu())
    }


def printed_losses(output: str) -> list[dict[str, float]]:
    """The losses by name of each training step."""
    steps = [line for line in output.splitlines() if "loss_attention_masked" in line]
    number = re.compile(r"(\w+) (-?\d+\.\d+|nan|-?inf)\b")
    return [{name: float(value) for name, value in number.findall(line)} for line in steps]


def test_every_parameter_of_the_student_and_of_the_adapters_moves(run: Run) -> None:
    assert unmoved(run.start, run.end) == []


def test_the_teacher_stays_bit_equal_and_without_gradients(run: Run) -> None:
    teacher = run.end.teacher
    assert differences(teacher.cpu().state_dict(), run.start.teacher.state_dict()) == set()
    assert all(value.grad is None for value in teacher.parameters())


def test_the_teacher_runs_in_training_and_not_in_evaluation(run: Run) -> None:
    assert run.teacher_calls == STEPS
    assert re.search("^(map|eval)", run.output, re.MULTILINE)


def test_each_step_prints_finite_losses_of_detector_and_distillation(run: Run) -> None:
    steps = printed_losses(run.output)
    assert len(steps) == STEPS
    for losses in steps:
        assert losses.keys() > DISTILLATION
        assert losses["loss_attention_masked"] > 0
        assert all(map(math.isfinite, losses.values()))


def test_the_checkpoint_holds_student_and_adapters_alone(run: Run) -> None:
    checkpoint = run.checkpoint()
    assert differences(checkpoint, run.end.state_dict()) == set()
    assert {key.partition(".")[0] for key in checkpoint} == {"student", "loss"}


def test_nothing_is_written_that_was_not_asked_for(run: Run) -> None:
    asked = Path(CHECKPOINTS[run.name][1]).parts[0]
    assert {path.name for path in run.folder.iterdir()} == {asked}


def test_the_plain_loop_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    first = start("plain_loop", tmp_path, "--steps", "2", "--checkpoint", "plain.pt")
    second = start("plain_loop", tmp_path, "--steps", "0", "--checkpoint", "plain.pt")
    assert differences(second.end.state_dict(), first.end.state_dict()) == set()
    third = start("plain_loop", tmp_path, "--steps", "1", "--checkpoint", "plain.pt")
    assert unmoved(first.end, third.end) == []
    state = torch.load(tmp_path / "plain.pt", weights_only=True)["optimizer"]["state"]
    assert {int(value["step"]) for value in state.values()} == {3}


def test_lightning_moves_the_teacher_in_on_fit_start_alone() -> None:
    module = importlib.import_module("examples.lightning_module").DistilledDetector().to("meta")
    teacher = module.distiller.teacher
    assert next(teacher.parameters()).device.type == "cpu"
    module.on_fit_start()
    assert {value.device.type for value in teacher.parameters()} == {"meta"}


def test_the_saved_student_of_the_hf_trainer_loads_as_any_rt_detr(tmp_path: Path) -> None:
    from transformers import RTDetrForObjectDetection

    run = start("hf_trainer", tmp_path, "--steps", "1", "--output", "hf")
    student = RTDetrForObjectDetection.from_pretrained(tmp_path / "hf/student")
    assert differences(student.state_dict(), run.end.student.state_dict()) == set()


def student_and_teacher(kind: str) -> tuple[nn.Module, nn.Module]:
    """Detectors some of whose weights have two names, on the example's scenes."""
    classes = {"num_labels": len(CLASSES)}
    kinds = {
        "d_fine": ("DFine", HYBRID | classes, "HGNetV2", HGNET_C3_TO_C5),
        "rt_detr_v2": ("RTDetrV2", HYBRID | classes, "RTDetrResNet", RESNET_C3_TO_C5),
        "deformable_detr": (
            "DeformableDetr",
            TRANSFORMER | classes | {"with_box_refine": True},
            "ResNet",
            RESNET_C3_TO_C5,
        ),
    }
    *names, of_backbone = kinds[kind]
    return hf(*names, **of_backbone), hf(*names, **of_backbone)


def with_models(monkeypatch: pytest.MonkeyPatch, kind: str) -> Any:
    """The example of the HF Trainer, with these models."""
    example = importlib.import_module("examples.hf_trainer")

    def build_distiller() -> featkd.Distiller:
        torch.manual_seed(0)
        stages = "model.backbone.model.encoder.stages.{}"
        layers = {"c3": stages.format(1), "c4": stages.format(2)}
        channels = {"c3": WIDTHS[1], "c4": WIDTHS[2]}
        loss = featkd.FeatureDistillationLoss(
            channels, channels, hyperparameters=featkd.STANDARDIZED
        )
        return example.Distiller(
            *student_and_teacher(kind), loss, layers, shared_input="model.backbone.model"
        )

    monkeypatch.setattr(example, "build_distiller", build_distiller)
    return example


@pytest.mark.parametrize("kind", ["d_fine", "rt_detr_v2"])
def test_the_hf_trainer_saves_and_resumes_a_student_with_tied_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = with_models(monkeypatch, kind).transformers.trainer
    first = start("hf_trainer", tmp_path, "--steps", "2", "--output", "hf")
    state, saved = first.end.state_dict(), load_file(tmp_path / "hf/checkpoint-2/model.safetensors")
    tied = state.keys() - saved.keys()
    assert tied
    assert differences(saved, state) == tied
    said: list[str] = []
    monkeypatch.setattr(trainer.logger, "warning", said.append)
    resume = ["--resume", str(tmp_path / "hf/checkpoint-2")]
    second = start("hf_trainer", tmp_path, "--steps", "2", "--output", "hf", *resume)
    assert differences(second.end.state_dict(), state) == set()
    assert second.teacher_calls == 0
    assert not any("keys" in text for text in said)
    weights = dict(second.end.named_parameters(remove_duplicate=False))
    assert {name for name in tied if name in weights} == tied
    assert tied.isdisjoint(dict(second.end.named_parameters()))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_the_hf_trainer_checkpoints_the_students_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = with_models(monkeypatch, "deformable_detr").transformers
    plain = start("hf_trainer", tmp_path, "--steps", "2", "--output", "plain")
    arguments = partial(transformers.TrainingArguments, gradient_checkpointing=True)
    monkeypatch.setattr(transformers, "TrainingArguments", arguments)
    run = start("hf_trainer", tmp_path, "--steps", "2", "--output", "hf")
    on = [getattr(module, "gradient_checkpointing", False) for module in run.end.student.modules()]
    assert any(on)
    for ours, expected in zip(
        printed_losses(run.output), printed_losses(plain.output), strict=True
    ):
        assert ours == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shared_input", [None, "backbone"])
@pytest.mark.parametrize("early_stop", [False, True])
def test_an_offloaded_teacher_gives_what_it_gives_at_home(
    shared_input: str | None, early_stop: bool
) -> None:
    from accelerate import cpu_offload

    options = {"shared_input": shared_input, "early_stop": early_stop}
    plain = featkd.Distiller(Net(4), Net(6), distillation_loss(), LEVELS, **options)
    student, teacher, loss = copy.deepcopy((plain.student, plain.teacher, plain.loss))
    cpu_offload(teacher, execution_device=torch.device("cpu"))
    distiller = featkd.Distiller(student, teacher, loss, LEVELS, **options)
    for _ in range(2):
        assert all(value.is_meta for value in teacher.parameters())
        expected, losses = plain(images())[1], distiller(images())[1]
        for name, value in losses.items():
            assert torch.equal(value, expected[name])
    terms = distiller.report(images()).terms
    assert {term.name: term.value for term in terms} == {k: v.item() for k, v in losses.items()}


def test_the_torchvision_script_trains_under_amp(tmp_path: Path) -> None:
    run = start("torchvision_reference", tmp_path, "--epochs", "2", "--steps", "2", "--amp")
    assert unmoved(run.start, run.end) == []
    losses = printed_losses(run.output)
    assert len(losses) == 4
    assert all(math.isfinite(value) for step in losses for value in step.values())
    assert list(tmp_path.iterdir()) == []


def test_the_vit_teachers_maps_follow_the_images() -> None:
    distiller = importlib.import_module("examples.vit_teacher").build_distiller()
    tokens, images, maps = [], [], []
    distiller.teacher.layernorm.register_forward_hook(lambda *call: tokens.append(call[-1]))
    distiller.teacher.register_forward_pre_hook(lambda _, args: images.append(args[0]))
    distiller.loss.register_forward_pre_hook(lambda _, args: maps.append([x["p4"] for x in args]))
    box = {"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    for size in [(96, 128), (128, 96), (96, 96), (128, 112), (112, 128)]:
        distiller([torch.rand(3, *size)] * 2, [box] * 2)
    for image, token, (ours, theirs) in zip(images, tokens, maps, strict=True):
        height, width = image.shape[2] // 14, image.shape[3] // 14
        # The class token and four registers come first.
        expected = token[:, 5:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
        assert torch.equal(theirs, expected)
        assert (16 * ours.shape[2], 16 * ours.shape[3]) == image.shape[2:]
    shapes = {image.shape[2:] for image in images}
    assert any(h > w for h, w in shapes)
    assert any(h < w for h, w in shapes)
    assert len(shapes) > 2
