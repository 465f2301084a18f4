"""The main job's command line and run folder: nothing is lost, and nothing does nothing."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
COCO = ["--data", "coco", "--images", "I", "--annotations", "A"]
WHOLE = ["--student", "ssdlite320_mobilenet_v3_large"]


def parse(*arguments: str | Path) -> Any:
    from examples.detection.__main__ import parse

    return parse([*map(str, arguments)])


# --- options --------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "images without coco": (["--images", "I"], "--images does nothing here: it wants --data coco"),
    "annotations": (["--annotations", "A"], "--annotations does nothing here"),
    "held-out without coco": (["--val-images", "I"], "--val-images does nothing here"),
    "their annotations": (["--val-annotations", "A"], "--val-annotations does nothing here"),
    "scenes in coco": ([*COCO, "--train-images", "4"], "--train-images does nothing here"),
    "held-out scenes": (
        [*COCO, "--held-out-images", "4"],
        "it wants --data scenes, sparse, pasted",
    ),
    "its default too": (
        [*COCO, "--held-out-images", "300"],
        "it wants --data scenes, sparse, pasted",
    ),
    "no teacher to train": (
        ["--teacher", __file__, "--teacher-steps", "9"],
        "--teacher-steps does nothing here: it wants no --teacher",
    ),
    "both": (["--resume", "--overwrite"], "--overwrite does nothing here: it wants no --resume"),
    "coco alone": (["--data", "coco"], "wants --images DIR and --annotations FILE"),
    "half": ([*COCO, "--val-images", "I"], "--val-images and --val-annotations go together"),
    "no teacher there": (["--teacher", "nowhere.pt"], "--teacher must be a file, got nowhere.pt"),
    "deeppcb's folder": (
        ["--deeppcb", "D"],
        "--deeppcb does nothing here: it wants --data deeppcb",
    ),
    "tiles of scenes": (["--tile", "quarter"], "--tile does nothing here: it wants --data deeppcb"),
    "deeppcb alone": (["--data", "deeppcb"], "--data deeppcb wants --deeppcb DIR"),
    "pasted's folder": (["--pasted", "D"], "--pasted does nothing here: it wants --data pasted"),
    "pasted alone": (["--data", "pasted"], "--data pasted wants --pasted DIR"),
    "pasted mirrored": (
        ["--data", "pasted", "--pasted", "D", "--flip", "0.5"],
        "--flip does nothing here: it wants --data coco or deeppcb",
    ),
    "scenes in deeppcb": (
        ["--data", "deeppcb", "--deeppcb", "D", "--train-images", "4"],
        "--train-images does nothing here: it wants --data scenes, sparse, pasted",
    ),
    "scenes mirrored": (["--flip", "0.5"], "--flip does nothing here: it wants --data coco or"),
    "too often mirrored": ([*COCO, "--flip", "2"], "--flip: must be in 0..1, got 2"),
    "scenes scaled": (
        ["--data", "sparse", "--scale-jitter", "0.1", "2"],
        "--scale-jitter does nothing here: it wants --data coco or deeppcb",
    ),
    "scaled to nothing": ([*COCO, "--scale-jitter", "0", "2"], "must be over 0 and finite, got 0"),
    "scaled backwards": (
        [*COCO, "--scale-jitter", "2", "0.1"],
        "--scale-jitter wants LOW first: 2 is over 0.1",
    ),
    "no such model": (["--student", "resnet9"], "--student: invalid choice: 'resnet9'"),
    "a detector beside two": (
        ["--detector", "fcos", *WHOLE, "--teacher-model", "retinanet_resnet50_fpn_v2"],
        "--detector does nothing here: it wants a model that is no whole detector",
    ),
    "weights of a trained one": (
        ["--teacher", __file__, "--teacher-weights", "imagenet"],
        "--teacher-weights does nothing here: it wants no --teacher",
    ),
    "compact ones": (
        ["--student-weights", "imagenet"],
        "--student-weights imagenet wants a model of torchvision or efficientnet_lite0: ",
    ),
    "coco's backbones": (
        ["--student", "resnet18", "--student-weights", "coco"],
        "--student-weights coco wants a whole detector of torchvision, as retinanet_resnet50_fpn",
    ),
    "no such weights": (
        ["--teacher-weights", "nowhere.pt"],
        "--teacher-weights nowhere.pt must be one of none, imagenet, coco, or a file",
    ),
    "a fixed size": (
        [*WHOLE, "--size", "96"],
        "--size must be 320, which one",
    ),
    "two fixed sizes": (
        [*WHOLE, "--teacher-model", "ssd300_vgg16"],
        "images of one size each",
    ),
    "no steps": (["--steps", "0"], "--steps: must be at least 1, got 0"),
    "no epochs": (["--epochs", "0"], "--epochs: must be over 0 and finite, got 0"),
    "epochs and steps": (["--steps", "600", "--epochs", "2"], "not allowed with argument --steps"),
    "the teacher's": (
        ["--teacher-epochs", "2", "--teacher-steps", "1000"],
        "not allowed with argument --teacher-epochs",
    ),
    "no epochs of a given one": (
        ["--teacher", __file__, "--teacher-epochs", "9"],
        "--teacher-epochs does nothing here: it wants no --teacher",
    ),
    "no such way out": (["--export", "tflite"], "--export: invalid choice: 'tflite'"),
    "no evaluations": (["--evaluations", "0"], "--evaluations: must be at least 1"),
    "no checkpoints": (["--checkpoint-every", "0"], "--checkpoint-every: must be at least 1"),
    "no rate": (["--learning-rate", "nan"], "--learning-rate: must be over 0 and finite, got nan"),
    "held-out seed": (["--seed", str(2**32)], "--seed: must be in 0..4294967295"),
    "no such device": (["--device", "gpu"], "--device gpu: torch knows no such device"),
    "no data on it": (["--device", "meta"], "--device meta: "),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_an_option_that_does_nothing_or_cannot_be_is_an_error(case: str, capsys: Any) -> None:
    arguments, text = BAD_OPTIONS[case]
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err.splitlines()[-1]


def test_the_commands_of_readme_and_guide_are_taken() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    found = re.findall(r"-m examples\.detection(?!\.)\b(.*)", text)
    assert len(found) > 4
    for arguments in found:
        parse(*shlex.split(arguments, comments=True))


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse("--device", "cuda")
    assert "--device cuda: torch finds no CUDA GPU here" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parse("--device", "cuda:1").device == "cuda:1"
    with pytest.raises(SystemExit):
        parse("--device", "cuda:2")
    assert "there are 2 CUDA GPUs here" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        parse("--device", "cuda:1")
    assert "torchrun gives each process its GPU" in capsys.readouterr().err


def test_more_processes_than_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.detection.processes import join_processes

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit, match="--nproc-per-node must be at most the 2 GPUs"):
        join_processes(torch.device("cuda"))


def test_quick_changes_defaults_alone() -> None:
    assert (parse("--quick").steps, parse("--quick").evaluations) == (12, 2)
    assert (parse("--quick", "--steps", "7").steps, parse().steps) == (7, 600)
    assert parse("--quick").output != parse().output
    # What it sets for scenes is no contradiction elsewhere.
    assert parse("--quick", *COCO).data == "coco"


def test_the_help_has_every_option_s_default(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    options = vars(parse())
    assert shown.count("(default: ") == len(options)
    assert "--output OUTPUT folder of the run (default: runs/distill_detector)" in shown
    assert "--teacher-steps TEACHER_STEPS of the teacher's training (default: 1000)" in shown


# --- the folder -----------------------------------------------------------------------------------


def begin(*arguments: str | Path) -> str:
    """What the job does with the folder before it trains."""
    from examples.detection.run_folder import RunFolder

    with RunFolder(parse(*arguments)) as folder:
        if (state := folder.take()) == "new":
            folder.begin({})
        return state


def refused(*arguments: str | Path) -> str:
    from examples.detection.processes import JobError

    with pytest.raises(JobError) as error:
        begin(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A finished run, and what a user has laid beside it."""
    folder = tmp_path / "used"
    begin("--output", folder)
    for name in ("teacher.pt", "plain.checkpoint.pt", "curves.png", "mine.pt", "mine.png"):
        (folder / name).write_text(name)
    (folder / "results.json").write_text("{}")
    return folder


def test_only_files_of_the_job_s_names_are_removed_and_only_where_asked(used: Path) -> None:
    before = contents(used)
    assert "holds a finished run" in refused("--output", used)
    assert begin("--output", used, "--resume") == "finished"
    assert "preset=fpn_outputs" in refused("--output", used, "--resume", "--preset", "fpn_outputs")
    assert contents(used) == before
    assert begin("--output", used, "--overwrite", "--preset", "fpn_outputs") == "new"
    assert contents(used).keys() == {"config.json", "mine.pt", "mine.png"}
    assert json.loads((used / "config.json").read_text())["options"]["preset"] == "fpn_outputs"


def test_an_unfinished_run_is_gone_on_with_or_replaced_by_name_alone(used: Path) -> None:
    (used / "results.json").unlink()
    before = contents(used)
    assert "holds an unfinished run: go on with --resume" in refused("--output", used)
    assert begin("--output", used, "--resume", "--workers", "2") == "unfinished"
    assert contents(used) == before
    assert begin("--output", used, "--overwrite") == "new"
    assert "plain.checkpoint.pt" not in contents(used)


def test_a_run_of_a_version_with_fewer_options_is_not_gone_on_with(used: Path) -> None:
    """As the new version may draw its pictures in another way."""
    config = json.loads((used / "config.json").read_text())
    del config["options"]["scale_jitter"], config["options"]["tile"]
    (used / "config.json").write_text(json.dumps(config))
    assert f"got one in {used} that has no --scale-jitter, --tile" in refused(
        "--output", used, "--resume"
    )
    assert begin("--output", used, "--overwrite") == "new"


@pytest.mark.parametrize("name", ["teacher.pt", "results.json", "curves.png", "config.json"])
def test_a_folder_that_is_no_run_s_loses_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "other.pt").write_text("other")
    (tmp_path / name).write_text('{"model_type": "detr"}')
    before = contents(tmp_path)
    for more in ([], ["--resume"], ["--overwrite"], ["--teacher", tmp_path / "other.pt"]):
        assert f"holds {name}, but no run of this job" in refused("--output", tmp_path, *more)
    assert contents(tmp_path) == before
    (tmp_path / name).unlink()
    assert begin("--output", tmp_path) == "new"
    assert (tmp_path / "other.pt").read_text() == "other"


def test_a_link_of_the_job_s_name_is_removed_and_not_what_it_leads_to(used: Path) -> None:
    elsewhere = used.parent / "elsewhere.pt"
    elsewhere.write_text("weights")
    (used / "plain.pt").symlink_to(elsewhere)
    (used / "distilled.pt").symlink_to("nowhere")
    begin("--output", used, "--overwrite")
    assert elsewhere.read_text() == "weights"
    assert not (used / "distilled.pt").is_symlink()


def test_a_named_teacher_is_never_removed_under_whatever_name(used: Path) -> None:
    link = used.parent / "link.pt"
    link.symlink_to(used / "teacher.pt")
    for teacher in (used / "teacher.pt", link, used / "mine.pt"):
        begin("--output", used, "--overwrite", "--teacher", teacher)
        assert teacher.read_text() in ("teacher.pt", "mine.pt")
    (used / "distilled.pt").write_text("distilled")
    link.unlink()
    link.symlink_to(used / "distilled.pt")
    for teacher in (used / "distilled.pt", link):
        said = refused("--output", used, "--overwrite", "--teacher", teacher)
        assert "--teacher must be no file that the run would write" in said
    coco = ["--data", "coco", "--images", used, "--annotations", used / "config.json"]
    said = refused("--output", used, "--overwrite", *coco)
    assert "--annotations must be no file that the run would write" in said
    assert (used / "distilled.pt").read_text() == "distilled"


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_a_broken_configuration_is_named_with_what_to_do(text: str, used: Path) -> None:
    (used / "config.json").write_text(text)
    before = contents(used)
    for more in ("--resume", "--overwrite"):
        said = refused("--output", used, more)
        assert f"{used / 'config.json'} cannot be read" in said
        assert "move the folder away, or choose another --output" in said
    assert contents(used) == before


def test_a_configuration_is_whole_or_the_one_before(
    used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def power_cut(*_: Any) -> None:
        raise KeyboardInterrupt("power cut")

    before = contents(used)["config.json"]
    with monkeypatch.context() as cut:
        cut.setattr(os, "replace", power_cut)
        with pytest.raises(KeyboardInterrupt):
            begin("--output", used, "--overwrite", "--seed", "9")
    # Nothing of the old run is left that one of other settings could take for its own.
    assert contents(used)["config.json"] == before
    assert "plain.checkpoint.pt" not in contents(used)
    assert begin("--output", used, "--overwrite", "--seed", "9") == "new"


def test_an_output_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert refused("--output", file) == f"--output {file}: File exists"
    assert file.read_text() == "mine"


HOLDER = """
import sys

from examples.detection.command_line import parse_options
from examples.detection.run_folder import RunFolder

with RunFolder(parse_options("", sys.argv[1:])) as folder:
    folder.take()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_on_a_folder_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    import subprocess

    output = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, "--output", output]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([*map(str, command)], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        assert "another process is at work in" in refused("--output", output)
        holder.kill()
        holder.wait()
    assert begin("--output", output) == "new"


def test_a_restart_goes_on_with_the_run_of_its_own_launch_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    assert begin("--output", tmp_path) == "new"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begin("--output", tmp_path) == "unfinished"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    assert "holds an unfinished run" in refused("--output", tmp_path)


# --- files of weights -----------------------------------------------------------------------------


def damaged(folder: Path) -> dict[str, Path]:
    weights = {"weight": torch.ones(3, 3), "bias": torch.ones(3)}
    torch.save(weights, folder / "whole.pt")
    whole = (folder / "whole.pt").read_bytes()
    files = {"empty": b"", "text": b"hi\n", "cut": whole[:-200], "zeros": b"\0" * 400}
    for name, content in files.items():
        (folder / f"{name}.pt").write_bytes(content)
    torch.save(torch.nn.Linear(3, 3), folder / "module.pt")
    return {name: folder / f"{name}.pt" for name in (*files, "module")}


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    from examples.detection.checkpoints import load, load_teacher
    from examples.detection.processes import JobError

    for file in damaged(tmp_path).values():
        with pytest.raises(JobError, match=f"{file} cannot be read .*: remove it, and its train"):
            load(file, {})
        with pytest.raises(JobError, match=f"{file} cannot be read .*--teacher wants a state dict"):
            load_teacher(torch.nn.Linear(3, 3), file)
    with pytest.raises(JobError, match="is no checkpoint of this model: remove it"):
        load(tmp_path / "whole.pt", {"model": torch.nn.Linear(3, 3)})


def test_a_teacher_is_a_state_dict_or_one_under_model_and_finite(tmp_path: Path) -> None:
    from argparse import Namespace

    from examples.detection.checkpoints import load_teacher
    from examples.detection.processes import JobError

    file, source = tmp_path / "teacher.pt", torch.nn.Linear(3, 3)
    state = source.state_dict()
    for content in (state, {"model": state, "args": Namespace(lr=1, device="cpu"), "epoch": 2}):
        torch.save(content, file)
        teacher = torch.nn.Linear(3, 3)
        load_teacher(teacher, file)
        assert torch.equal(teacher.weight, source.weight)
    for content in (torch.ones(3), {"weight": state["weight"]}, {"model": 3}, [state]):
        torch.save(content, file)
        with pytest.raises(JobError, match="must fit --detector and the data"):
            load_teacher(teacher, file)
    torch.save(state | {"bias": torch.tensor([0.0, float("nan"), 0.0])}, file)
    with pytest.raises(JobError, match="must hold finite weights, got others in bias"):
        load_teacher(teacher, file)
