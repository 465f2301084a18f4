"""`.ci/cuda` brings its figures home whatever fails; nobody sits beside the GPU that it runs on."""

import json
import os
import subprocess

import pytest

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


@pytest.mark.parametrize("arguments", [(), ("tests",), ("all", "out"), ("cpu", "out")])
def test_a_call_that_says_too_little_says_how_to_call(arguments, tmp_path):
    found = run(*arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert ".ci/cuda tests|benchmarks OUT" in found.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_benchmark_runs_on_the_cpu(tmp_path):
    found = run("cpu", "benchmarks", tmp_path)
    assert found.returncode == 0, found.stdout
    files = {file.name: file for file in tmp_path.iterdir()}
    names = sorted({*BENCHMARKS, "training_step-bf16"})
    assert sorted(files) == ["benchmarks.log", *(f"{name}-cpu.json" for name in names)]
    for name in names:
        assert json.loads(files[f"{name}-cpu.json"].read_text())["rows"]
