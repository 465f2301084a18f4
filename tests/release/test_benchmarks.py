"""The benchmarks, and `.ci/cuda`, which brings their figures home whatever fails."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.measure import busy, record, tree_id
from benchmarks.pyramid import PRESETS, both
from tests.helpers.tensors import close, normal
from tests.release.test_release import ROOT

BENCHMARKS = ["pyramid", "relations", "training_step", "training_step", "losses"]
# Writes down how it was called. The relations fail, and so does pytest, as FAIL says.
PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$2" in benchmarks.relations|pytest) exit "${FAIL:-0}" ;; esac
"""


@pytest.fixture
def stubs(tmp_path):
    """Commands of the names that the script calls."""
    for name, text in {"python": PYTHON, "nvidia-smi": "#!/bin/sh\nexit 9\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "CALLS": str(tmp_path / "calls")}


def run(*arguments, cwd=ROOT, **options):
    command = [ROOT / ".ci" / "cuda", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, **options)


def test_what_fails_stops_nothing_and_is_the_exit_code(stubs, tmp_path):
    found = run("benchmarks", "out", cwd=tmp_path, env=stubs | {"FAIL": "3"})
    assert found.returncode == 3
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == [f"benchmarks.{name}" for name in BENCHMARKS]
    assert all(f"--device cuda --results {tmp_path / 'out'}" in call for call in calls)
    table = found.stdout.splitlines()[-len(BENCHMARKS) :]
    assert ["exit code   3" in line for line in table] == [n == "relations" for n in BENCHMARKS]
    assert (tmp_path / "out" / "benchmarks.log").read_text() == found.stdout


@pytest.mark.parametrize("code", [0, 1])
def test_the_exit_code_of_the_tests_is_returned(code, stubs, tmp_path):
    found = run("tests", tmp_path / "out", env=stubs | {"FAIL": str(code)})
    assert found.returncode == code
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call == "-m pytest -q -W default -m cuda tests/contract/test_cuda.py"
    assert (tmp_path / "out" / "tests.log").read_text() == found.stdout


def test_the_pictures_go_through_the_main_job(stubs, tmp_path):
    (tmp_path / "boards").mkdir()
    found = run("pictures", "out", "boards", cwd=tmp_path, env=stubs)
    assert found.returncode == 0
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith(f"-m examples.detection --data deeppcb --deeppcb {tmp_path / 'boards'} ")
    assert "exit code   0" in found.stdout.splitlines()[-1]


def test_a_busy_machine_computes_on_every_core_and_is_left_idle(monkeypatch):
    others, start = [], subprocess.Popen

    def started(command):
        others.append(start(command))
        return others[-1]

    monkeypatch.setattr(subprocess, "Popen", started)
    with busy():
        assert [other.poll() for other in others] == [None] * os.cpu_count()
    assert None not in [other.poll() for other in others]


TOO_LITTLE = [(), ("tests",), ("all", "out"), ("cpu", "out"), ("pictures", "out"), ("tests", 1, 2)]


@pytest.mark.parametrize("arguments", TOO_LITTLE)
def test_a_call_that_says_too_little_says_how_to_call(arguments, tmp_path):
    found = run(*map(str, arguments), cwd=tmp_path)
    assert found.returncode == 2
    assert ".ci/cuda tests|benchmarks OUT" in found.stderr
    assert not list(tmp_path.iterdir())


def test_a_benchmark_that_breaks_off_keeps_its_rows(tmp_path, capsys):
    def rows():
        yield {"ms": 1.5}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record("some", torch.device("cpu"), rows(), {"ms": ".2f"}, tmp_path / "results")
    found = json.loads((tmp_path / "results" / "some-cpu.json").read_text())
    assert found["rows"] == [{"ms": 1.5}]
    assert "1.50" in capsys.readouterr().out


def test_the_source_has_the_name_that_git_gives_it(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/b.py", "a.py", "z"):
        (tmp_path / name).write_text(name)
    expected = subprocess.run(
        "git init -q . && git add -A && git write-tree",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    (tmp_path / ".git").rename(tmp_path.parent / "of_git")
    (tmp_path / "__pycache__").mkdir()
    assert tree_id(tmp_path) == expected.stdout.strip()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plain_pyramid_is_the_preset(preset):
    """Where its formulas are written plainly: 1e-6 beside a deviation is 1e-6 of the value."""
    plainly, ours = (loss.double() for loss in both(preset, {"p3": 4, "p4": 4}))
    student, teacher = (
        {
            level: normal(2, 4, side, side + 1, seed=seed + side)
            for level, side in (("p3", 6), ("p4", 3))
        }
        for seed in (0, 10)
    )
    close(plainly(student, teacher), sum(ours(student, teacher).values()), 1e-5)


# Compiling takes minutes, and other tests compile.
EAGER = {"pyramid": ["--no-compile"], "losses": ["--no-compile"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*BENCHMARKS}))
def test_a_benchmark_runs_on_the_cpu(name, tmp_path):
    options = ["--quick", "--results", str(tmp_path), *EAGER.get(name, [])]
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert json.loads((tmp_path / f"{name}-cpu.json").read_text())["rows"]
