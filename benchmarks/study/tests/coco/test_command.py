"""The command: finished runs, killed runs, several processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.study.coco import __main__ as job
from benchmarks.study.coco import train
from benchmarks.study.lines import COLUMNS
from benchmarks.study.tests.coco.folder import RETINANET, command, lines_in

ROOT = Path(job.__file__).parents[3]


def test_finished_runs_leave_lines_and_are_not_repeated(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = command(coco, tmp_path, *RETINANET, "--steps", "1")
    job.main(arguments)
    lines = lines_in(tmp_path)
    assert [line["method"] for line in lines] == ["teacher", "none", "featkd"]
    teacher, plain, distilled = lines
    assert plain["student"] == distilled["student"] == ["retinanet_resnet50_fpn", None]
    assert distilled["teacher"]["shape"] == ["retinanet_resnet50_fpn_v2", None]
    assert distilled["teacher_ap"] == teacher["ap"]
    assert plain["teacher_ap"] is None
    assert plain["data"]["train_images"] == 5
    assert plain["data"] == distilled["data"]
    assert plain.keys() > {*COLUMNS, "seconds", "device", "versions"}
    assert plain["seconds"] > 0
    suffixes = {file.name.partition(".")[2] for file in (tmp_path / "runs").iterdir()}
    assert suffixes == {"pt"}

    with monkeypatch.context() as idle:
        idle.setattr(job, "perform", None)
        job.main(arguments)
    assert lines_in(tmp_path) == lines
    job.main(["tables", "--lines", str(tmp_path / "lines.jsonl")])
    table = (tmp_path / "tables.md").read_text()
    assert table.count("| retinanet_resnet50_fpn |") == 2


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*RETINANET, "--method", "featkd", "--steps", "2", "--checkpoint-every", "1"]
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    job.main(command(coco, tmp_path / "whole", *more))
    kept = train.save

    def save_and_die(*rest: Any) -> None:
        kept(*rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(train, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            job.main(command(coco, tmp_path / "killed", *more))
    assert [line["method"] for line in lines_in(tmp_path / "killed")] == ["teacher"]
    steps = []
    noted = train.backward
    monkeypatch.setattr(train, "backward", lambda *a: steps.append(a) or noted(*a))
    job.main(command(coco, tmp_path / "killed", *more))
    assert len(steps) == 1
    (first,), (second,) = ((tmp_path / f / "runs").glob("*.pt") for f in ("whole", "killed"))
    whole, resumed = (torch.load(file, weights_only=True) for file in (first, second))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_loss_that_is_no_number_ends_the_run(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {"classification": torch.tensor(float("nan"))}
    monkeypatch.setattr(train, "backward", lambda *rest: (lost, {}))
    more = [*RETINANET, "--method", "none", "--steps", "1"]
    with pytest.raises(FloatingPointError, match="step 1 is nan"):
        job.main(command(coco, tmp_path, *more))
    assert not (tmp_path / "lines.jsonl").exists()


def test_no_line_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no line of a run in"):
        job.main(["tables", "--lines", str(tmp_path / "lines.jsonl")])


def test_a_folder_that_is_not_coco_s_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--coco"):
        job.main(command(tmp_path, tmp_path))


@pytest.mark.slow
def test_two_processes_perform_each_run_together_and_one_finds_nothing_left(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = ["--detector", "maskrcnn_resnet50_fpn", "--method", "featkd", "--steps", "1"]
    arguments = command(coco, tmp_path, *runs)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, "-m", "benchmarks.study.coco", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = lines_in(tmp_path)
    assert [line["method"] for line in lines] == ["teacher", "featkd"]
    assert all(line["device"].startswith("2 x ") for line in lines)
    assert all(line["mask_ap"] is not None for line in lines)
    assert done.stdout.count(": AP ") == 2
    monkeypatch.setattr(job, "perform", None)
    job.main(arguments)
    assert lines_in(tmp_path) == lines
