"""`examples/ultralytics_yolo.py` in Ultralytics' trainer: logged, recovered, resumed, saved.

The models are built from the package's own configs, with random weights; 16 pictures of 64 pixels.
`.ci/ultralytics` makes the environment and runs this file.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.models import hook_count, snapshot, unchanged, watch

pytestmark = pytest.mark.ultralytics

ROOT = Path(__file__).parents[2]
# Student and teacher; YOLO26 has a second head, and a criterion that changes with the epochs.
PAIRS = {
    "YOLOv8n from YOLO11s": ("yolov8n.yaml", "yolo11s.yaml"),
    "YOLO11n from YOLO11s": ("yolo11n.yaml", "yolo11s.yaml"),
    "YOLO26n from YOLO26s": ("yolo26n.yaml", "yolo26s.yaml"),
}
SIZE, IMAGES, BATCH, EPOCHS = 64, 16, 8, 3
SETTINGS = {
    "imgsz": SIZE,
    "batch": BATCH,
    "nbs": BATCH,  # a step of the optimizer for each batch
    "epochs": EPOCHS,
    "warmup_epochs": 0,
    "optimizer": "AdamW",
    "lr0": 1e-3,
    "device": "cpu",
    "workers": 0,
    "plots": False,
    "exist_ok": True,
}


@pytest.fixture(scope="session", autouse=True)
def what_the_matrix_says_beside_the_results(record_testsuite_property):
    for package in ("torch", "torchvision", "ultralytics"):
        record_testsuite_property(package, version(package))


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Ultralytics in a folder of its own, with the font that it would download, and no network."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "Ultralytics").mkdir()
    (folder / "Ultralytics" / "Arial.ttf").touch()
    asked = []

    def refuse(host, *_, **__):
        asked.append(host)
        raise OSError(f"no network in a test, asked for {host}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLO_CONFIG_DIR", str(folder))
        patch.setenv("YOLO_OFFLINE", "true")
        patch.setenv("YOLO_AUTOINSTALL", "false")
        patch.setattr(socket, "getaddrinfo", refuse)
        yield
    assert asked == []


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A bright rectangle on noise in each picture, red or green."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for i in range(IMAGES):
        pixels = generator.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
        width, height = generator.integers(16, 40, 2)
        left, top = generator.integers(0, SIZE - width), generator.integers(0, SIZE - height)
        pixels[top : top + height, left : left + width, i % 2] = 220
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        box = np.array([left + width / 2, top + height / 2, width, height]) / SIZE
        (folder / "labels" / f"{i}.txt").write_text(f"{i % 2} {' '.join(map(str, box))}\n")
    file = folder / "data.yaml"
    file.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: [red, green]\n")
    return file


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, data):
    """Makes a pair: settings of the student, and a teacher with a trained one's statistics."""
    from ultralytics import YOLO

    def prepare(name):
        torch.manual_seed(0)
        student, config = PAIRS[name]
        teacher, folder = YOLO(config), tmp_path_factory.mktemp("pair")
        for module in teacher.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # the mean over all batches
        with torch.no_grad():
            for _ in range(4):
                teacher.model.train()(torch.rand(4, 3, SIZE, SIZE))
        teacher.save(folder / "teacher.pt")
        settings = {**SETTINGS, "model": student, "data": str(data)}
        return SimpleNamespace(settings=settings, teacher=folder / "teacher.pt", folder=folder)

    return prepare


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, prepared):
    return prepared(request.param)


@pytest.fixture(scope="module")
def one_pair(prepared):
    """For what is no cell of the matrix."""
    return prepared("YOLO11n from YOLO11s")


def make(pair, name, **settings):
    from examples.ultralytics_yolo import DistillingTrainer

    DistillingTrainer.teacher = str(pair.teacher)
    overrides = {"project": str(pair.folder), "name": name, **settings}
    return DistillingTrainer(overrides=overrides)


def criterion_of(trainer):
    return trainer.model.criterion


def rows(trainer):
    """The columns of results.csv."""
    names, *lines = trainer.csv.read_text().splitlines()
    columns = zip(*(map(float, line.split(",")) for line in lines), strict=True)
    return dict(zip(names.split(","), columns, strict=True))


def adapters(model):
    return {name: value.float().clone() for name, value in model.distillation.state_dict().items()}


def saved(file):
    from ultralytics.utils.patches import torch_load

    return torch_load(file, map_location="cpu")


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def run(pair):
    """A whole run, what was seen in it, and its checkpoint after the second epoch."""
    trainer = make(pair, "run", **pair.settings)
    interrupted = pair.folder / "interrupted.pt"
    seen = SimpleNamespace(teacher_calls=Counter(), ema=[], interrupted=interrupted)

    def start(trainer):
        seen.adapters = adapters(trainer.model)

    def first_batch(trainer):
        if not hasattr(seen, "teacher"):
            teacher = criterion_of(trainer).teacher
            seen.teacher = snapshot(teacher)
            count = seen.teacher_calls
            for i in (0, -1):
                teacher.model[i].register_forward_hook(
                    lambda *_, i=i: count.update([(i, trainer.epoch, torch.is_grad_enabled())])
                )

    def save(trainer):
        ema = trainer.ema.ema
        seen.ema.append((adapters(ema), adapters(trainer.model), ema.criterion))
        if trainer.epoch == 1:
            shutil.copy(trainer.last, interrupted)

    trainer.add_callback("on_train_start", start)
    trainer.add_callback("on_train_batch_start", first_batch)
    trainer.add_callback("on_model_save", save)
    trainer.train()
    seen.teacher_calls = dict(seen.teacher_calls)  # not the tests' own
    return SimpleNamespace(trainer=trainer, **vars(seen))


def batch():
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.4, 0.2, 0.3]])
    labels = {"batch_idx": torch.tensor([0.0, 1.0]), "cls": torch.zeros(2, 1), "bboxes": boxes}
    return {"img": torch.rand(2, 3, SIZE, SIZE), **labels}


def in_training(trainer):
    """The student as it is within a training step."""
    criterion_of(trainer).listen(trainer)
    return trainer.model.train()


def test_values(run):
    """Beside the criterion's own: n images times the loss of what plain hooks see."""
    student, images = in_training(run.trainer), batch()
    criterion = criterion_of(run.trainer)
    ours, theirs = (list(tap.layers.values()) for tap in criterion.taps)
    own = []
    with (
        pytest.MonkeyPatch.context() as patch,
        watch(student, ours) as student_features,
        watch(criterion.teacher, theirs) as teacher_features,
    ):
        plain = criterion.own
        patch.setattr(criterion, "own", lambda *given: own.append(plain(*given)) or own[0])
        total, items = student(images)
    (own_total, own_items), names = own[0], list(student.distillation.levels)
    expected = sum(
        student.distillation(
            dict(zip(names, (student_features[path] for path in ours), strict=True)),
            dict(zip(names, (teacher_features[path] for path in theirs), strict=True)),
        ).values()
    )
    assert expected > 0
    assert torch.equal(total, own_total.sum() + 2 * expected)
    assert items == {**own_items, "kd_loss": expected}


def test_gradient(run, monkeypatch):
    student, criterion = in_training(run.trainer), criterion_of(run.trainer)
    monkeypatch.setattr(criterion, "own", lambda *_: (torch.zeros(3), {}))
    student.zero_grad()
    student(batch())[0].backward()
    head = f"model.{student.model[-1].i}."
    reached = [name for name, value in student.named_parameters() if value.grad is not None]
    assert reached == [name for name, _ in student.named_parameters() if not name.startswith(head)]
    assert any(name.startswith("distillation.") for name in reached)
    assert all(student.get_parameter(name).grad.abs().sum() > 0 for name in reached)


def test_teacher(run):
    teacher = criterion_of(run.trainer).teacher
    assert unchanged(teacher, run.teacher)
    assert not any(module.training for module in teacher.modules())
    assert all(value.grad is None for value in teacher.parameters())
    # Its first layer at each training step, not in validation; its head never; no graph.
    steps = IMAGES // BATCH
    assert run.teacher_calls == {(0, epoch, False): steps for epoch in range(EPOCHS)}


def test_distills(run):
    results = rows(run.trainer)
    first, *_, last = results["train/kd_loss"]
    assert 0 < last < first
    assert results["val/kd_loss"] == (0,) * EPOCHS
    assert all(np.isfinite(values).all() for values in results.values())
    assert list(results)[2:6] == [f"train/{name}" for name in run.trainer.loss_names]


def test_resume(pair, run):
    trainer = make(pair, "resumed", resume=run.interrupted, save_dir=str(pair.folder / "resumed"))
    seen = SimpleNamespace()

    def start(trainer):
        seen.adapters, seen.epoch = adapters(trainer.model), trainer.epoch
        states = trainer.optimizer.state
        parameters = trainer.model.distillation.parameters()
        seen.steps = [int(states[parameter]["step"]) for parameter in parameters]

    trainer.add_callback("on_train_epoch_start", start)
    trainer.train()
    checkpoint = saved(run.interrupted)
    assert seen.epoch == checkpoint["epoch"] + 1 == 2
    assert equal(seen.adapters, adapters(checkpoint["ema"]))
    assert not equal(seen.adapters, run.adapters)
    assert seen.steps == [2 * IMAGES // BATCH] * len(seen.steps)
    assert rows(trainer)["train/kd_loss"][0] < rows(run.trainer)["train/kd_loss"][0]
    if hasattr(criterion_of(trainer).own, "update"):  # YOLO26's
        assert criterion_of(trainer).updates == criterion_of(run.trainer).updates == EPOCHS


@pytest.fixture(scope="module")
def recovered(pair):
    """A run in whose second epoch a weight of the student becomes NaN."""
    trainer = make(pair, "nan", **pair.settings)
    seen = SimpleNamespace(epochs=[])

    def poison(trainer):
        if trainer.epoch == 1 and trainer.nan_recovery_attempts == 0:
            trainer.model.model[0].conv.weight.data.fill_(torch.nan)

    def start(trainer):
        seen.epochs.append(trainer.epoch)
        if trainer.nan_recovery_attempts == 1:
            seen.adapters = adapters(trainer.model), adapters(saved(trainer.last)["ema"])

    trainer.add_callback("on_train_batch_start", poison)
    trainer.add_callback("on_train_epoch_start", start)
    trainer.train()
    return SimpleNamespace(trainer=trainer, **vars(seen))


def test_nan_recovery(recovered):
    assert recovered.epochs == [0, 1, 1, 2]
    assert equal(*recovered.adapters)
    results = rows(recovered.trainer)
    assert all(np.isfinite(values).all() for values in results.values())
    first, *_, last = results["train/kd_loss"]
    assert 0 < last < first


def test_ema(run, recovered):
    """It averages the adapters, has a criterion of its own, and the student's tap does not hear it.

    Of the two runs the recovered one's average has copies of the hooks.
    """
    before = run.adapters
    for average, trained, criterion in run.ema:
        assert type(criterion) is type(criterion_of(run.trainer).own)
        assert average.keys() == trained.keys()
        for name, value in average.items():
            assert not torch.equal(value, trained[name])
            assert not torch.equal(value, before[name])
        before = average
    for each, copied in ((run, False), (recovered, True)):
        average = each.trainer.ema.ema.eval()
        assert (hook_count(average) > 0) == copied
        in_training(each.trainer)
        average(batch()["img"])
        with pytest.raises(RuntimeError, match="got 0"):
            criterion_of(each.trainer).taps[0].pop()


# Where featkd cannot be imported, the files are read and used; the second reading is torch's own
# with weights_only=True, and Ultralytics' list of classes.
HIDDEN = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "featkd":
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hide())
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import torch_safe_load

for file in sys.argv[1:]:
    YOLO(file).predict(torch.rand(1, 3, 64, 64), verbose=False, save=False)
    torch_safe_load(file, safe_only=True)
"""


def python(*arguments):
    command = [sys.executable, *map(str, arguments)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_without_featkd(pair, run, recovered):
    from ultralytics import YOLO

    from examples.ultralytics_yolo import strip

    files = [f for each in (run, recovered) for f in (each.trainer.last, each.trainer.best)]
    names = list(YOLO(pair.settings["model"]).model.state_dict())
    for file in files:
        checkpoint = saved(file)
        assert hook_count(checkpoint["model"]) == 0
        assert list(checkpoint["model"].state_dict()) == names
    halfway = shutil.copy(run.interrupted, pair.folder / "halfway.pt")
    assert "featkd" in python("-c", HIDDEN, halfway).stderr
    strip(halfway)
    done = python("-c", HIDDEN, *files, halfway)
    assert done.returncode == 0, done.stderr


def test_the_example_as_it_is_started(one_pair):
    settings = one_pair.settings | {"project": one_pair.folder, "name": "started", "epochs": 1}
    arguments = [f"{name}={value}" for name, value in settings.items()]
    done = python("-m", "examples.ultralytics_yolo", f"teacher={one_pair.teacher}", *arguments)
    assert done.returncode == 0, done.stderr
    assert "kd_loss" in (one_pair.folder / "started" / "results.csv").read_text()
    assert not hasattr(
        saved(one_pair.folder / "started" / "weights" / "best.pt")["model"], "distillation"
    )


def test_from_a_model_of_ultralytics(one_pair):
    """As its users train, who have weights: `YOLO(file).train(trainer=DistillingTrainer)`."""
    from ultralytics import YOLO

    from examples.ultralytics_yolo import DistillingTrainer

    DistillingTrainer.teacher = str(one_pair.teacher)
    student = one_pair.folder / "student.pt"
    YOLO(one_pair.settings["model"]).save(student)
    model = YOLO(student)
    settings = {**one_pair.settings, "model": str(student), "epochs": 1}
    model.train(trainer=DistillingTrainer, project=str(one_pair.folder), name="from", **settings)
    assert rows(model.trainer)["train/kd_loss"][0] > 0
    assert not hasattr(model.model, "distillation")


def test_a_batch_that_runs_out_of_memory(one_pair):
    """Ultralytics halves the batch and begins again; the captures of the first try are dropped."""
    trainer = make(one_pair, "memory", **one_pair.settings | {"epochs": 1})
    tries = []

    def run_out(*_):
        tries.append(trainer.batch_size)
        if len(tries) == 1:
            raise RuntimeError("out of memory")

    def listen(trainer):
        if not tries:
            trainer.model.model[-1].register_forward_pre_hook(run_out)

    trainer.add_callback("on_train_batch_start", listen)
    trainer.train()
    assert tries == [BATCH, *[BATCH // 2] * (IMAGES // (BATCH // 2))]
    assert rows(trainer)["train/kd_loss"][0] > 0
