"""The main job end to end, as a person starts it: its files, its resumption, its real data."""

import argparse
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.ops import masks_to_boxes

from tests.helpers.coco_folder import write_coco

ROOT = Path(__file__).parents[2]
TINY = ["--quick", "--steps", "4", "--checkpoint-every", "2"]
TEACHER = ["--teacher-steps", "4"]
DRAWS = ["--detector", "faster_rcnn"]
PICTURES = {"curves.png", "attention.png", "detections.png"}
FILES = {"results.json", *PICTURES, "teacher.pt", "plain.pt", "student.pt"}


def run(*arguments: str | Path) -> None:
    from examples.detection.__main__ import main

    torch.set_num_threads(1)
    teacher = [] if "--teacher" in arguments else TEACHER
    main([*TINY, *teacher, *map(str, arguments)])


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Not ignored, as they are where a shell or `nohup` has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hung_up)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One unbroken run, of the detector that draws random numbers as it trains."""
    folder = tmp_path_factory.mktemp("finished")
    run(*DRAWS, "--output", folder)
    return folder


@pytest.mark.slow
def test_the_job_leaves_pictures_and_results(finished: Path) -> None:
    assert {file.name for file in finished.iterdir()} >= FILES
    results = json.loads((finished / "results.json").read_text())
    assert set(results["runs"]) == {"teacher", "plain", "distilled"}
    assert results["classes"] == ["background", "disc", "square", "triangle", "cross"]
    assert len(results["runs"]["plain"]["losses"]) == 4
    assert results["parameters"]["teacher"] > 2 * results["parameters"]["distilled"]
    assert results["runs"]["distilled"]["distillation"][0] > 0
    assert set(results["runs"]["plain"]["distillation"]) == {0}


@pytest.mark.parametrize("taps", ["fpn", "stages"])
@pytest.mark.parametrize("detector", ["fcos", "fasterrcnn_resnet50_fpn"])
def test_what_enters_or_leaves_the_fpn_is_distilled(detector: str, taps: str) -> None:
    from examples.detection.__main__ import parse
    from examples.detection.detectors import levels_of, tapped
    from examples.detection.models import new_detector
    from examples.detection.parts import new_distiller

    options = parse(["--detector", detector, "--taps", taps, "--size", "96"])
    student, teacher = (new_detector(options, role, 5) for role in ("student", "teacher"))
    stages = levels_of(student)
    paths = stages if taps == "stages" else [f"backbone[{i}]" for i, _ in enumerate(stages)]
    layers, _ = tapped(student, teacher, taps, 96)
    assert list(layers.values()) == list(zip(paths, paths, strict=True))
    distiller = new_distiller(options, student, teacher)
    assert distiller.loss.channels.keys() == layers.keys()
    image = [torch.rand(3, 96, 96)]
    target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
    _, losses = distiller(image, [target])
    assert losses["loss_attention_masked"] > 0


@pytest.mark.slow
def test_a_broken_job_resumes_to_the_same_result(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from examples.detection import training

    saves = []

    def save_thrice(path: Path, *rest: Any) -> None:
        if len(saves) == 3:
            raise KeyboardInterrupt
        saves.append(path.name)
        whole_save(path, *rest)

    whole_save = training.save
    monkeypatch.setattr(training, "save", save_thrice)
    with pytest.raises(SystemExit) as stop:
        run(*DRAWS, "--output", tmp_path, "--resume")
    monkeypatch.undo()
    assert stop.value.code == 130
    printed = capsys.readouterr()
    assert "to go on with: starting one" in printed.out
    assert printed.err.splitlines()[-1] == "stopped; go on with --resume"
    assert saves == ["teacher.checkpoint.pt"] * 2 + ["plain.checkpoint.pt"]
    with pytest.raises(SystemExit, match="--resume"):
        run(*DRAWS, "--output", tmp_path)
    with pytest.raises(SystemExit, match="seed=9 for 0"):
        run(*DRAWS, "--seed", "9", "--output", tmp_path, "--resume")

    # Ctrl-C within step 3, of which the job would save no checkpoint.
    def backward(*rest: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return whole_backward(*rest)

    whole_backward = training.backward
    monkeypatch.setattr(training, "backward", backward)
    with pytest.raises(SystemExit) as stop:
        run(*DRAWS, "--output", tmp_path, "--resume")
    monkeypatch.undo()
    assert stop.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "plain: stopped at step 3; go on with --resume"
    assert torch.load(tmp_path / "plain.checkpoint.pt", weights_only=True)["step"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    run(*DRAWS, "--output", tmp_path, "--resume")
    assert "distilled - plain" in capsys.readouterr().out
    for name in ("teacher.pt", "plain.pt", "student.pt"):
        whole = torch.load(finished / name, weights_only=True)
        resumed = torch.load(tmp_path / name, weights_only=True)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    runs = [json.loads((f / "results.json").read_text())["runs"] for f in (finished, tmp_path)]
    for name in ("teacher", "plain", "distilled"):
        assert runs[0][name]["losses"] == runs[1][name]["losses"]
        assert runs[0][name]["evaluations"] == runs[1][name]["evaluations"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "within", "step"),
    [
        ("SIGTERM", "backward", 1),
        ("SIGTERM", "evaluate", 4),
        ("SIGHUP", "evaluate", 4),
        ("SIGINT", "evaluate", 4),
    ],
)
def test_what_asks_to_end_in_a_step_or_in_the_last_evaluation_ends_the_job(
    name: str, within: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from examples.detection import training

    def signalled(*rest: Any) -> Any:
        # From elsewhere, as where a cluster stops the job: the loader's processes hear of it too.
        processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        subprocess.run(["kill", f"-{name.removeprefix('SIG')}", *map(str, processes)], check=True)
        time.sleep(0.5)  # until a loader that has died of it is heard of
        return whole(*rest)

    whole = getattr(training, within)
    monkeypatch.setattr(training, within, signalled)
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    with pytest.raises(SystemExit) as stop:
        run("--evaluations", "1", "--workers", "1", "--output", tmp_path)
    assert stop.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"teacher: stopped at step {step}; go on with --resume"
    assert torch.load(tmp_path / "teacher.checkpoint.pt", weights_only=True)["step"] == step
    assert before == [
        signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    ]


def test_a_job_under_nohup_outlives_its_terminal() -> None:
    from examples.detection.interrupts import interrupts

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interrupts() as asked:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not asked
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_ctrl_c_before_there_is_a_run_names_none_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from examples.detection import __main__ as job

    def ctrl_c(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "load_data", ctrl_c)
    for options in (["--output", tmp_path / "run"], ["--dry-run"]):
        with pytest.raises(SystemExit):
            run(*options)
        assert capsys.readouterr().err.splitlines()[-1] == "stopped"
        monkeypatch.setattr(job, "dry_run", ctrl_c)


def test_a_checkpoint_is_saved_every_few_minutes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.detection import training

    saved = []
    monkeypatch.setattr(training, "save", lambda *rest: saved.append(rest[-1]))
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    run("--evaluations", "1", "--checkpoint-every", "100", "--output", tmp_path)
    assert saved == [1, 2, 3, 4] * 3


def test_a_full_disk_is_one_line_and_leaves_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.detection.checkpoints import write_atomically
    from examples.detection.processes import JobError

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "teacher.checkpoint.pt"
    write_atomically(file, {"step": 2})
    monkeypatch.setattr(os, "fsync", full)
    text = (
        r"checkpoint\.pt cannot be written \(OSError.*No space left.*: is the disk full\? Mend it"
    )
    with pytest.raises(JobError, match=text):
        write_atomically(file, {"step": 4})
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
    assert torch.load(file, weights_only=True) == {"step": 2}


def test_whoever_reads_the_progress_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.detection.progress import Progress

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.EIO, "the terminal is gone")

    monkeypatch.setattr(sys, "stdout", Gone())
    with Progress("plain", 3, 0, "step") as progress:
        progress.say("plain: held-out AP 0.1")
        progress.advance()
    assert progress.done == 1


def test_of_several_processes_the_silent_ones_say_nothing(capsys: Any) -> None:
    from examples.detection.progress import Progress

    for silent in (True, False):
        with Progress("plain", 3, 0, "step", silent=silent) as progress:
            progress.say("plain: held-out AP 0.1")
    assert capsys.readouterr().out == "plain: held-out AP 0.1\n"


COMPILED = """
import torch
from torch import nn
from examples.detection.parts import compile_backbones

narrow = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 8, 1, 2))
model = nn.ModuleDict({"backbone": narrow})
compile_backbones([model], torch.device("cpu"))
for _ in range(20):
    narrow(torch.rand(8, 3, 96, 96)).square().mean().backward()
"""


@pytest.mark.slow
def test_compiled_backbones_do_not_crash() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_a_finished_run_and_its_teacher_outlive_the_next_job(
    finished: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    before, teacher = contents(folder), folder / "teacher.pt"
    again = [*DRAWS, "--output", folder]
    for arguments in (again, [*again, "--teacher", teacher]):
        with pytest.raises(SystemExit, match=r"holds a finished run: .* give --overwrite"):
            run(*arguments)
    with pytest.raises(SystemExit, match=r"must be no file that the run would write, got .*plain"):
        run(*again, "--teacher", folder / "plain.pt", "--overwrite")
    run(*again, "--resume")
    assert "is finished" in capsys.readouterr().out
    assert contents(folder) == before
    run(*again, "--resume", "--export", "onnx")
    assert f"{folder / 'student.onnx'}: takes " in capsys.readouterr().out
    (folder / "student.onnx").unlink()
    (folder / "student.pt").rename(tmp_path / "student.pt")
    with pytest.raises(SystemExit, match=r"--export wants .*, which is gone"):
        run(*again, "--resume", "--export", "onnx")
    (tmp_path / "student.pt").rename(folder / "student.pt")
    assert contents(folder) == before

    # A teacher that does not fit is found before the run is replaced.
    with pytest.raises(SystemExit, match="must fit --detector"):
        run("--detector", "fcos", "--output", folder, "--teacher", teacher, "--overwrite")
    assert contents(folder) == before
    run(*again, "--teacher", teacher, "--overwrite", "--preset", "fpn_outputs")
    after = contents(folder)
    assert after["teacher.pt"] == before["teacher.pt"]
    assert "teacher.checkpoint.pt" not in after
    assert after["student.pt"] != before["student.pt"]
    assert after["plain.pt"] == before["plain.pt"]
    options = json.loads(after["results.json"])["options"]
    assert (options["amp"], options["seed"], options["learning_rate"]) == (False, 0, 3e-3)
    assert (options["teacher"], options["images"]) == (str(teacher), None)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_job_at_that_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from examples.detection import training

    steps = []

    def lost(*rest: Any) -> Any:
        steps.append(len(steps))
        losses, distillation = backward(*rest)
        if len(steps) == 11:
            distillation["loss_attention_masked"] = torch.tensor(float("nan"))
        return losses, distillation

    backward = training.backward
    monkeypatch.setattr(training, "backward", lost)
    text = "distilled: loss_attention_masked is nan at step 3; .* the checkpoint of step 2 is kept"
    with pytest.raises(SystemExit, match=text):
        run("--output", tmp_path)
    assert torch.load(tmp_path / "distilled.checkpoint.pt", weights_only=True)["step"] == 2
    assert not (tmp_path / "results.json").exists()
    # No bar where there is no terminal, but a line for each training that has come to its end.
    printed = capsys.readouterr().err
    assert "\r" not in printed
    assert printed.count("step 4 of 4, loss") == 2


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_a_coco_folder_with_a_given_teacher(detector: str, tmp_path: Path, capsys: Any) -> None:
    images, annotations = write_coco(tmp_path)
    annotations.write_text(annotations.read_text().replace('"wide"', '"$w_^$"'))
    data = ["--data", "coco", "--images", images, "--annotations", annotations]
    data += ["--detector", detector]
    run(*data, "--output", tmp_path / "a", "--amp")
    assert "1 images without a box kept as background" in capsys.readouterr().out
    teacher = tmp_path / "a" / "teacher.pt"
    state = torch.load(teacher, weights_only=True)
    # As torchvision's reference scripts write it.
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}, teacher)
    held_out = ["--val-images", images, "--val-annotations", annotations]
    run(*data, *held_out, "--teacher", teacher, "--output", tmp_path / "b")
    loaded = torch.load(tmp_path / "b" / "teacher.pt", weights_only=True)
    assert all(torch.equal(state[name], loaded[name]) for name in state)
    with pytest.raises(SystemExit, match="--teacher"):
        run("--teacher", teacher, "--output", tmp_path / "c")


# The second process dies in the last step of all; each notes the steps that it has begun.
DYING_WORKER = """
import os, signal, sys
from pathlib import Path

from examples.detection import training
from examples.detection.__main__ import main

log, *arguments = sys.argv[1:]
rank, restarts = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
steps = []

def noted(*rest):
    steps.append(len(steps))
    Path(log, f"rank {rank}, restart {restarts}").write_text(str(len(steps)))
    if (rank, restarts, len(steps)) == ("1", "0", 12):
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(*rest)

backward, training.backward = training.backward, noted
main(arguments)
"""


def launched(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launch, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=240,
    )


def torchrun(*arguments: str | Path) -> str:
    done = launched(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two_processes")
    return folder, torchrun("-m", "examples.detection", *TINY, *TEACHER, "--output", folder)


@pytest.mark.slow
def test_two_processes_train_data_parallel(two_processes: tuple[Path, str]) -> None:
    folder, printed = two_processes
    assert printed.count("distilled - plain") == 1
    assert {file.name for file in folder.iterdir()} >= FILES


@pytest.mark.slow
def test_a_job_that_loses_a_process_repeats_the_steps_since_its_checkpoint_alone(
    two_processes: tuple[Path, str], tmp_path: Path
) -> None:
    worker, log, output = tmp_path / "worker.py", tmp_path / "log", tmp_path / "output"
    worker.write_text(DYING_WORKER)
    log.mkdir()
    torchrun("--max-restarts=1", worker, log, *TINY, *TEACHER, "--output", output)
    begun = {file.name: int(file.read_text()) for file in log.iterdir()}
    # Three models of 4 steps, a checkpoint every second.
    assert begun["rank 1, restart 0"] == 12
    assert begun["rank 0, restart 1"] == begun["rank 1, restart 1"] == 2
    for name in ("teacher.pt", "plain.pt", "student.pt"):
        whole = torch.load(two_processes[0] / name, weights_only=True)
        restarted = torch.load(output / name, weights_only=True)
        assert all(torch.equal(whole[key], restarted[key]) for key in whole)


# Of one process a loss is lost, or Ctrl-C reaches it, in the third step.
STOPPED_WORKER = """
import os, signal, sys

from examples.detection import training
from examples.detection.__main__ import main

what, *arguments = sys.argv[1:]
steps = []

def lost(*rest):
    steps.append(len(steps))
    losses, distillation = backward(*rest)
    if os.environ["RANK"] == "1" and len(steps) == 3:
        if what == "nan":
            losses["classification"] = losses["classification"] * float("nan")
        else:
            os.kill(os.getpid(), signal.SIGINT)
    return losses, distillation

backward, training.backward = training.backward, lost
main(arguments)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "text", "step"),
    [
        ("nan", "teacher: classification is nan at step 3", 2),
        ("interrupt", "teacher: stopped at step 3; go on with --resume", 3),
    ],
)
def test_what_stops_one_process_stops_all_and_is_said_once(
    what: str, text: str, step: int, tmp_path: Path
) -> None:
    worker, output = tmp_path / "worker.py", tmp_path / "output"
    worker.write_text(STOPPED_WORKER)
    done = launched(worker, what, *TINY, *TEACHER, "--output", output)
    assert done.returncode != 0
    assert done.stderr.count(text) == 1
    assert torch.load(output / "teacher.checkpoint.pt", weights_only=True)["step"] == step


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.detection import progress

    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    for seconds, lines in ((60.0, [3]), (0.0, [2, 3])):
        monkeypatch.setattr(progress, "SECONDS", seconds)
        with progress.Progress("plain", 3, 1, "step") as counted:
            counted.advance("loss 2.00")
            counted.advance("loss 1.00")
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate(0)
        assert ("\r" in text) == terminal
        expected = [f"plain: step {i} of 3, loss {4 - i}.00" for i in lines]
        assert terminal or text.splitlines() == expected


def test_restarts_on_several_nodes_want_a_store_that_does_not_outlive_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from examples.detection.processes import join_processes

    for name, value in {
        "WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        join_processes(torch.device("cpu"))


@pytest.mark.parametrize("name", ["DENSE", "SPARSE"])
def test_scenes_are_a_pure_function_of_seed_and_index(name: str) -> None:
    from examples.detection import scenes

    kind = getattr(scenes, name)
    first, second = (scenes.Scenes(3, 10, kind=kind) for _ in range(2))
    image, target = first[7]
    again, _ = second[7]
    assert torch.equal(image, again)
    assert not torch.equal(image, scenes.Scenes(4, 10, kind=kind)[7][0])
    assert image.shape == (3, kind.size, kind.size)
    assert 1 <= len(target["labels"]) <= kind.objects[1]
    assert target["image_id"] == 7
    boxes = target["boxes"]
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert boxes.min() >= 0
    assert boxes.max() <= kind.size


@pytest.mark.parametrize(("name", "least", "most"), [("DENSE", 0.30, 0.40), ("SPARSE", 0.03, 0.04)])
def test_the_share_of_the_pixels_in_boxes(name: str, least: float, most: float) -> None:
    from examples.detection import scenes

    kind = getattr(scenes, name)
    inside = torch.zeros(60, kind.size, kind.size)
    for index, (_, target) in enumerate(scenes.Scenes(3, 60, kind=kind)):
        for left, top, right, bottom in target["boxes"].tolist():
            inside[index, top:bottom, left:right] = 1
    assert least < inside.mean() < most


def test_dense_scenes_are_those_of_the_published_lines() -> None:
    from examples.detection.scenes import draw_scene

    image, boxes, labels, _ = draw_scene(20, 5)
    assert boxes == [[11, 41, 26, 57], [4, 65, 34, 95], [60, 64, 80, 84]]
    assert labels == [1, 2, 1]
    # Another NumPy may round a pixel otherwise.
    assert image.sum(dtype="int64") == pytest.approx(2694669, abs=10)


def test_a_compact_fcos_for_small_objects_has_smaller_levels_and_a_wider_centre() -> None:
    from examples.detection.detectors import build

    usual, small = (build("fcos", "student", 5, 64, small_objects=small) for small in (False, True))
    assert usual.anchor_generator.sizes == ((2,), (4,), (8,))
    assert small.anchor_generator.sizes == ((1,), (2,), (4,))
    assert (usual.center_sampling_radius, small.center_sampling_radius) == (1.5, 3.0)


def test_masks_are_what_is_in_sight_of_each_object_and_change_nothing_else() -> None:
    from examples.detection.scenes import MIN_VISIBLE, Scenes

    plain, masked = Scenes(3, 20), Scenes(3, 20, masks=True)
    hidden = 0
    for (image, target), (same_image, with_masks) in zip(plain, masked, strict=True):
        masks = with_masks.pop("masks")
        assert torch.equal(image, same_image)
        assert target.keys() == with_masks.keys()
        assert all(torch.equal(target[name], with_masks[name]) for name in target)
        assert masks.dtype == torch.uint8
        assert masks.shape == (len(target["labels"]), 96, 96)
        assert masks.sum(0).max() == 1
        tight = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        boxes = target["boxes"]
        assert (tight[:, :2] >= boxes[:, :2]).all()
        assert (tight[:, 2:] <= boxes[:, 2:]).all()
        # Nothing hides the last; a cross, the thinnest, fills over a third of its box.
        assert torch.equal(tight[-1].int(), boxes[-1].int())
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        assert (masks.sum((1, 2)) > MIN_VISIBLE * areas / 3).all()
        hidden += int((tight != boxes).any(1).sum())
    assert hidden > 0


class Answers(torch.nn.Module):
    """A detector that has found this in the images to come."""

    def __init__(self, *found: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.found = iter(found)

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [next(self.found) for _ in images]


def settings_to_evaluate() -> Any:
    from examples.detection.training import Settings

    return Settings(8, 1e-3, 0, torch.device("cpu"), False, 0, 1, 0, 2.0)


def found_in(data: Any, shift: float = 0.0) -> list[dict[str, torch.Tensor]]:
    """The truth, its boxes shifted, its masks as probabilities above and below 0.5."""
    targets = [data[i][1] for i in range(len(data))]
    return [
        {
            "boxes": target["boxes"].as_subclass(torch.Tensor) + shift,
            "labels": target["labels"],
            "scores": torch.ones(len(target["labels"])),
            "masks": 0.3 + 0.3 * target["masks"].as_subclass(torch.Tensor)[:, None],
        }
        for target in targets
    ]


def test_masks_are_evaluated_by_themselves_beside_the_boxes() -> None:
    from examples.detection.scenes import Scenes
    from examples.detection.training import MASK_METRICS, METRICS, evaluate

    data, settings = Scenes(3, 4, masks=True), settings_to_evaluate()
    right = evaluate(Answers(*found_in(data)), data, settings)
    assert list(right) == [*METRICS, *MASK_METRICS]
    assert all(right[name] == pytest.approx(1) for name in ("map", *MASK_METRICS))
    shifted = evaluate(Answers(*found_in(data, shift=200.0)), data, settings)
    assert shifted["map"] == 0
    assert all(shifted[name] == pytest.approx(1) for name in MASK_METRICS)
    none = [{name: value[:0] for name, value in each.items()} for each in found_in(data)]
    assert evaluate(Answers(*none), data, settings)["mask_map"] == 0


def test_boxes_alone_are_evaluated_as_before_where_either_side_has_no_masks() -> None:
    from examples.detection.scenes import Scenes
    from examples.detection.training import METRICS, evaluate

    masked, settings = Scenes(3, 4, masks=True), settings_to_evaluate()
    boxes = [{k: v for k, v in each.items() if k != "masks"} for each in found_in(masked)]
    assert list(evaluate(Answers(*boxes), masked, settings)) == list(METRICS)
    assert list(evaluate(Answers(*found_in(masked)), Scenes(3, 4), settings)) == list(METRICS)


def test_mask_r_cnn_learns_from_masks_and_finds_some() -> None:
    from examples.detection.batches import collate
    from examples.detection.detectors import MASK_RCNN, build
    from examples.detection.scenes import Scenes
    from examples.detection.training import MASK_METRICS, evaluate

    torch.manual_seed(0)
    model = build(MASK_RCNN, "student", 5, 96)
    data = Scenes(3, 2, masks=True)
    losses = model(*collate([data[0], data[1]]))
    assert losses["loss_mask"] > 0
    losses["loss_mask"].backward()
    stage = model.get_submodule("backbone.body.layer2")
    assert all(p.grad.abs().sum() > 0 for p in stage.parameters())
    assert evaluate(model, data, settings_to_evaluate()).keys() >= set(MASK_METRICS)


@pytest.mark.parametrize("name", ["resnet18", "regnet", "mobilenet"])
def test_a_student_of_another_backbone_is_paired_with_the_teacher_at_what_enters_its_fpn(
    name: str,
) -> None:
    import featkd
    from examples.detection.batches import collate
    from examples.detection.detectors import BACKBONES, LEVELS, build, levels_of
    from examples.detection.scenes import Scenes

    assert name in BACKBONES
    student, teacher = (build("fcos", "student", 5, 96, shape) for shape in (name, (6, 1, 32)))
    assert levels_of(teacher) == list(LEVELS)
    match = featkd.match_layers(student, teacher, [torch.zeros(3, 96, 96)])
    levels = match.select("c2", "c3", "c4")
    assert list(levels.layers.values()) == list(zip(levels_of(student), LEVELS, strict=True))
    assert 50_000 < sum(p.numel() for p in student.parameters()) < 250_000
    data = Scenes(3, 2)
    sum(student(*collate([data[0], data[1]])).values()).backward()
    for path in levels_of(student):
        assert all(p.grad.abs().sum() > 0 for p in student.get_submodule(path).parameters())


def test_all_backbones_are_tested() -> None:
    from examples.detection.detectors import BACKBONES

    assert list(BACKBONES) == ["resnet18", "regnet", "mobilenet"]
