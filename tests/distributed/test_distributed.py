"""Two gloo processes, each with its share of the images, train as one process with all of them."""

import copy
import runpy
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from examples.detection import __main__ as job
from examples.detection import batches, checkpoints, detectors, training
from examples.detection.models import new_detector
from examples.detection.parts import new_distiller
from examples.detection.scenes import Scenes
from featkd import Distiller
from tests.helpers.models import LEVELS, Net, distillation_loss, images

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

WORLD = 2
# RetinaNet's own losses are means over the images, so that they too agree; 5 images are 3 and 2.
OPTIONS = job.parse(
    ["--detector=retinanet", "--preset=two_stage", "--taps=stages", "--batch-size=5"]
)
SETTINGS = training.Settings(
    batch_size=OPTIONS.batch_size,
    learning_rate=1e-3,
    seed=0,
    device=torch.device("cpu"),
    amp=False,
    workers=0,
    checkpoint_every=2,
    evaluations=0,
    area_scale=1.0,
)
STEPS = 4
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


# --- what is trained ------------------------------------------------------------------------------


def net():
    """The same in every process; normalized by running statistics, as the batches differ."""
    torch.manual_seed(0)
    return Distiller(Net(4).eval(), Net(6), distillation_loss(), LEVELS, shared_input="backbone")


def in_float64_by_running_statistics(student, args):
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    pixels, targets = args
    return [image.double() for image in pixels], targets


def scenes():
    return Scenes(0, 12)


def detector():
    """The main job's distiller, with the same start in every process."""
    student, teacher = (new_detector(OPTIONS, role, 5) for role in ("student", "teacher"))
    distiller = new_distiller(OPTIONS, student, teacher).double()
    teacher.double()
    student.register_forward_pre_hook(in_float64_by_running_statistics)
    return distiller


def net_step(model):
    rank, ranks = training.world()
    net_backward(model, images(4).chunk(ranks)[rank])


def net_backward(model, batch):
    output, losses = model(batch)
    (output.square().mean() + sum(losses.values())).backward()


def detector_step(model):
    """The main job's, of this rank's images."""
    data = scenes()
    (indices,) = batches.batch_indices(len(data), SETTINGS.batch_size, SETTINGS.seed, 0, 1)
    training.backward(model, batches.collate([data[i] for i in indices]), SETTINGS)


MODELS = {"net": (net, net_step), "detector": (detector, detector_step)}


# --- how it is wrapped ----------------------------------------------------------------------------


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    paths = LEVELS.values() if isinstance(model.student, Net) else detectors.LEVELS
    parts = [model.student.get_submodule(path) for path in paths]
    for part in (*parts, model.loss, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (WORLD,)))
    return model


def unwrapped(model):
    return model


WRAPPERS = {"ddp": ddp, "fsdp2": fsdp2}


def whole(tensors):
    """On every rank, under the names of the unwrapped model."""
    return {
        name.removeprefix("module."): t.full_tensor() if isinstance(t, DTensor) else t
        for name, t in tensors
    }


def gradients(model):
    return whole((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)


def after_two_steps(name, wrap):
    """The gradients; the second step finds the state that the first has left."""
    build, step = MODELS[name]
    model = wrap(build())
    for _ in range(2):
        model.zero_grad()
        step(model)
    return gradients(model)


# --- what each rank does --------------------------------------------------------------------------


def run(rank, folder):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(minutes=5),
    )
    found = {
        "gradients": {
            (wrap, name): after_two_steps(name, WRAPPERS[wrap])
            for wrap in WRAPPERS
            for name in MODELS
        },
        "after the other rank's last batch": after_the_other_ranks_last_batch(),
        "after the end of distillation": after_the_end_of_distillation(),
        "student wrapped alone": student_wrapped_alone(),
        "a seed a rank": a_seed_a_rank(),
        "communicated": communicated(),
        "saves": train_until_the_first_checkpoint(folder / "ddp-two.pt"),
        "resumed by ddp": train_on(folder / "ddp-one.pt"),
        "resumed by fsdp2": step_from(folder / "fsdp2-one.pt", fsdp2),
        "unbroken by fsdp2": step_twice(folder / "fsdp2-two.pt", fsdp2),
    }
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def after_the_other_ranks_last_batch():
    """Rank 0 has a batch more than rank 1."""
    model = ddp(net())
    with model.join():
        for seed in range(WORLD - dist.get_rank()):
            model.zero_grad()
            net_backward(model, images(2, seed=seed))
    return gradients(model)


def after_the_end_of_distillation():
    """The student's gradients of a step of its own, and what an optimizer does to the adapters."""
    model = ddp(net())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    net_step(model)
    optimizer.step()
    optimizer.zero_grad()
    distiller = model.module
    before = copy.deepcopy(distiller.loss.state_dict())
    del model
    student = ddp(distiller.student)
    rank, ranks = training.world()
    student(images(4).chunk(ranks)[rank]).square().mean().backward()
    optimizer.step()
    after = distiller.loss.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    return gradients(student)


def student_wrapped_alone():
    """The error's text; none where the loss has nothing to train, or is wrapped too."""
    plain = net()
    parts = ddp(plain.student), plain.teacher
    with pytest.raises(ValueError, match="`student` must not be wrapped by itself") as caught:
        Distiller(*parts, plain.loss, LEVELS)
    Distiller(*parts, ddp(plain.loss), LEVELS)
    Distiller(*parts, nn.Identity(), LEVELS)
    plain.student.backbone = ddp(plain.student.backbone)
    with pytest.raises(ValueError, match="`student` must not be wrapped by itself"):
        Distiller(plain.student, plain.teacher, plain.loss, LEVELS)
    return str(caught.value)


def a_seed_a_rank():
    """The adapters that this rank has drawn, and what FSDP2 and DDP make of all ranks' draws."""
    torch.manual_seed(dist.get_rank())
    loss = distillation_loss()
    drawn = copy.deepcopy(dict(loss.named_parameters()))
    by_ddp = copy.deepcopy(dict(ddp(copy.deepcopy(loss)).module.named_parameters()))
    fully_shard(loss, mesh=init_device_mesh("cpu", (WORLD,)))
    return {"drawn": drawn, "ddp": by_ddp, "fsdp2": whole(loss.named_parameters())}


def communicated():
    """Bytes that one step hands to the all-reduce."""
    model, sizes = ddp(detector()), []

    def count(state, bucket):
        sizes.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, count)
    detector_step(model)
    return sum(sizes)


def train_on(checkpoint):
    model = detector()
    training.train("", model, scenes(), None, STEPS, SETTINGS, checkpoint)
    return model.state_dict()


class InterruptError(Exception):
    pass


def train_until_the_first_checkpoint(checkpoint):
    """How many files this rank has written."""

    def save_and_stop(*args):
        save(*args)
        raise InterruptError

    save = training.save
    with (
        mock.patch.object(training, "save", save_and_stop),
        mock.patch.object(torch, "save", wraps=torch.save) as spy,
        pytest.raises(InterruptError),
    ):
        train_on(checkpoint)
    return spy.call_count


def with_optimizer(wrap):
    model = wrap(detector())
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def step_twice(checkpoint, wrap):
    """The weights; the checkpoint is of the first step."""
    model, optimizer = with_optimizer(wrap)
    detector_step(model)
    optimizer.step()
    content = get_state_dict(model, optimizer, options=FULL)
    if training.world()[0] == 0:
        torch.save(content, checkpoint)
    optimizer.zero_grad()
    detector_step(model)
    optimizer.step()
    return whole(model.named_parameters())


def step_from(checkpoint, wrap):
    model, optimizer = with_optimizer(wrap)
    weights, state = torch.load(checkpoint, weights_only=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=FULL)
    detector_step(model)
    optimizer.step()
    return whole(model.named_parameters())


# --- what must hold -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def unbroken_steps(folder):
    return step_twice(folder / "fsdp2-one.pt", unwrapped)


@pytest.fixture(scope="module")
def found(folder, unbroken_steps):
    """What each rank has."""
    train_until_the_first_checkpoint(folder / "ddp-one.pt")
    mp.start_processes(run, (folder,), WORLD, start_method="spawn")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


def equal(found, expected, tolerance=1e-9):
    """Each tensor, up to `tolerance` times its largest value."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= tolerance * value.abs().max(), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_gradients_of_student_and_adapters_equal_those_of_one_process(wrap, name, found):
    expected = after_two_steps(name, unwrapped)
    assert {parameter.split(".")[0] for parameter in expected} == {"student", "loss"}
    assert all(gradient.any() for gradient in expected.values())
    for rank in found:
        equal(rank["gradients"][wrap, name], expected)


def test_a_rank_without_a_last_batch_neither_hangs_nor_counts(found):
    model = net()
    net_backward(model, images(2, seed=WORLD - 1))
    alone = {name: gradient / WORLD for name, gradient in gradients(model).items()}
    equal(found[0]["after the other rank's last batch"], alone)


def test_after_distillation_the_student_in_a_wrapper_of_its_own_averages_its_gradients(found):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    net_step(model)
    optimizer.step()
    optimizer.zero_grad()
    model.student(images(4)).square().mean().backward()
    for rank in found:
        equal(rank["after the end of distillation"], gradients(model.student))


def test_a_student_that_is_wrapped_alone_is_an_error(found):
    for rank in found:
        assert "got DistributedDataParallel: wrap the distiller" in rank["student wrapped alone"]


def test_of_a_seed_a_rank_ddp_takes_rank_0_s_draw_and_fsdp2_some_rows_of_each(found):
    ranks = [rank["a seed a rank"] for rank in found]
    first, second = (rank["drawn"] for rank in ranks)
    assert not all(torch.equal(first[name], second[name]) for name in first)
    for rank in ranks:
        for name in first:
            rows = len(first[name].chunk(WORLD)[0])
            assert torch.equal(rank["ddp"][name], first[name])
            joined = torch.cat([first[name][:rows], second[name][rows:]])
            assert torch.equal(rank["fsdp2"][name], joined)


def test_checkpoints_are_written_by_one_rank_alone(found):
    assert [rank["saves"] for rank in found] == [1, 0]


@pytest.mark.parametrize("resumed", ["one process after two", "two processes after one"])
def test_a_run_resumes_on_another_number_of_processes(resumed, found, folder, tmp_path):
    unbroken = train_on(tmp_path / "unbroken.pt")
    if resumed == "one process after two":
        file = Path(shutil.copy(folder / "ddp-two.pt", tmp_path))
        assert torch.load(file, weights_only=True)["step"] == SETTINGS.checkpoint_every
        equal(train_on(file), unbroken)
    else:
        file = folder / "ddp-one.pt"
        for rank in found:
            equal(rank["resumed by ddp"], unbroken)
    ours, expected = (
        torch.load(file, weights_only=True),
        torch.load(tmp_path / "unbroken.pt", weights_only=True),
    )
    assert ours["step"] == len(ours["curve"]["losses"]) == STEPS
    assert ours["schedule"] == expected["schedule"]
    for index, state in expected["optimizer"]["state"].items():
        equal(ours["optimizer"]["state"][index], state)


def test_an_interrupted_write_leaves_the_checkpoint_before(tmp_path):
    def write_half(content, file):
        file.write(b"half")
        raise InterruptError

    file = tmp_path / "checkpoint.pt"
    checkpoints.write_atomically(file, {"step": 1})
    with mock.patch.object(torch, "save", write_half), pytest.raises(InterruptError):
        checkpoints.write_atomically(file, {"step": 2})
    assert torch.load(file, weights_only=True) == {"step": 1}


def test_the_gradients_that_ddp_sends_are_of_the_computed_size(found):
    scaling = runpy.run_path(ROOT / "benchmarks" / "scaling.py")
    trained, frozen = scaling["sizes"](detector())
    assert [rank["communicated"] for rank in found] == [trained] * WORLD
    assert scaling["communicated"](trained, frozen, WORLD)["DDP"] == trained


def test_the_table_of_scaling_is_of_the_formulas(monkeypatch, capsys):
    """8 ranks; 47 M trained parameters of 4 bytes."""
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--ranks", "8"])
    runpy.run_path(ROOT / "benchmarks" / "scaling.py", run_name="__main__")
    *_, ddp_row, fsdp2_row = capsys.readouterr().out.splitlines()
    assert ddp_row == "| 8 | DDP | 331 | 189 | 379 | 379 | 183 | 1129 |"
    assert fsdp2_row == "| 8 | FSDP2 | 497 | 24 | 24 | 47 | 183 | 278 |"


def test_an_fsdp2_run_goes_on_from_one_process_and_one_process_from_it(
    found, folder, unbroken_steps
):
    for rank in found:
        equal(rank["unbroken by fsdp2"], unbroken_steps)
        equal(rank["resumed by fsdp2"], unbroken_steps)
    equal(step_from(folder / "fsdp2-two.pt", unwrapped), unbroken_steps)
