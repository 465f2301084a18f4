"""A teacher's forward that is left once all is captured."""

import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from featkd import Distiller, FeatureTap
from featkd.taps.early_stop import stopped_after_last_capture
from tests.helpers.distilled import Inputs, RunsTwice, Seen, call_teacher, make, values
from tests.helpers.models import (
    LEVELS,
    Net,
    detector,
    detector_images,
    detector_targets,
    distillation_loss,
    images,
    plain_hooks,
    raises,
)
from tests.helpers.tensors import close

CALLS = {
    "as the student": {},
    "shared input": {"shared_input": ""},
    "teacher_forward": {"teacher_forward": call_teacher},
}
each_call = pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)


@each_call
def test_a_teacher_left_early_gives_what_a_whole_one_gives(options):
    distiller = make(early_stop=True, **options)
    whole = Distiller(
        copy.deepcopy(distiller.student),
        copy.deepcopy(distiller.teacher),
        copy.deepcopy(distiller.loss),
        LEVELS,
        **options,
    )
    ours, theirs = Inputs(distiller.student.head), Inputs(distiller.teacher.head)
    for seed in range(3):
        batch = images(seed=seed)
        for value, expected in zip(values(distiller, batch), values(whole, batch), strict=True):
            close(value, expected, 0.0)
    assert len(ours) == 3
    assert not theirs


def test_a_detector_left_early_runs_nothing_behind_its_last_tap():
    layers = {"c3": "backbone.body.6", "c4": "backbone.body.12"}
    student, teacher = detector("mobilenet").train(), detector("mobilenet").eval()
    distiller = Distiller(student, teacher, Seen(), layers, early_stop=True)
    behind = Inputs(teacher.backbone.body["13"])
    distiller(detector_images(), detector_targets())
    assert not behind
    expected = plain_hooks(teacher, layers.values(), lambda: teacher(detector_images()))
    for level, path in layers.items():
        assert torch.equal(distiller.loss.teacher[level], expected[path])


def is_at_rest(distiller):
    store = distiller._teacher_tap._store
    return not store.armed and store.wanted is None and not store.captured


@each_call
def test_nothing_stays_behind_a_teacher_left_early(options):
    distiller = make(early_stop=True, **options)
    distiller(images())
    assert is_at_rest(distiller)
    teacher = distiller.teacher
    close(teacher(images()), copy.deepcopy(teacher)(images()), 0.0)
    assert teacher(images()).requires_grad


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_exception_of_the_teacher_passes_through(error):
    distiller = make(early_stop=True)
    fails = distiller.teacher.backbone.c2.register_forward_pre_hook(partial(fail, error))
    with pytest.raises(error, match="teacher"):
        distiller(images())
    assert is_at_rest(distiller)
    assert torch.is_grad_enabled()
    fails.remove()
    distiller(images())


def fail(error, module, args):
    raise error("teacher")


class SetsModes(Net):
    """Sets torch's modes by function call, and sets them back at the end."""

    def forward(self, batch):
        before = torch.get_autocast_dtype("cpu")
        torch.set_grad_enabled(True)
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.float16)
        torch.set_autocast_cache_enabled(False)
        output = super().forward(batch)
        torch.set_autocast_cache_enabled(True)
        torch.set_autocast_dtype("cpu", before)
        torch.set_autocast_enabled("cpu", False)
        torch.set_grad_enabled(False)
        return output


class SetsModesInside(Net):
    def forward(self, batch):
        with torch.enable_grad(), torch.autocast("cpu", torch.float16, cache_enabled=False):
            return super().forward(batch)


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
    )


@pytest.mark.parametrize("teacher", [SetsModes, SetsModesInside])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_torchs_modes_are_as_before_whatever_the_teacher_set(teacher, gradients, autocast):
    distiller = Distiller(Net(4), teacher(6), distillation_loss(), LEVELS, early_stop=True)
    inside = Inputs(distiller.teacher.head)
    with (
        torch.set_grad_enabled(gradients),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        before = modes()
        distiller(images())
        assert modes() == before
    assert not inside


class SetsAutocast(nn.Module):
    """Has no weights, whose devices would be looked at."""

    def __init__(self):
        super().__init__()
        self.body = nn.Identity()

    def forward(self, batch):
        torch.set_autocast_enabled("cpu", True)
        return self.body(batch)


def test_torchs_modes_are_as_before_a_model_without_weights():
    model, before = SetsAutocast(), modes()
    tap = FeatureTap(model, ["body"])
    with tap, stopped_after_last_capture(tap):
        model(images())
    assert modes() == before


def test_a_teacher_on_the_meta_device_is_left_early():
    student, teacher = Net(4).to("meta"), Net(6).to("meta")
    behind = Inputs(teacher.head)
    Distiller(student, teacher, Seen(), LEVELS, early_stop=True)(images().to("meta"))
    assert not behind


@pytest.mark.parametrize("path", ["backbone.c2.conv", "backbone.c2.norm"])
def test_an_in_place_operation_behind_the_last_tap_changes_nothing(path):
    layers = {"c1": "backbone.c1.norm", "c2": path}
    teacher = Net(6)
    distiller = Distiller(Net(4), teacher, Seen(), layers, early_stop=True)
    distiller(images())
    expected = plain_hooks(teacher, layers.values(), lambda: teacher(images()))
    for level, their_path in layers.items():
        close(distiller.loss.teacher[level], expected[their_path], 0.0)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_forward_is_left_with_the_last_call_that_is_expected(calls):
    head, rest = nn.Identity(), nn.Identity()
    runs = Inputs(head), Inputs(rest)
    model = nn.ModuleDict({"head": head, "rest": rest})

    def run():
        for _ in range(3):
            head(images())
        rest(images())

    tap = FeatureTap(model, {"p": "head"}, calls={"p": calls})
    with tap:
        with stopped_after_last_capture(tap):
            run()
        assert len(tap.pop()) == calls
    assert [len(inputs) for inputs in runs] == [calls, 0]


def test_a_forward_is_left_for_the_tap_that_has_it_all():
    model = Net()
    outer, inner = FeatureTap(model, ["backbone.c1"]), FeatureTap(model, ["backbone.c2"])
    with outer, stopped_after_last_capture(outer):
        with inner, stopped_after_last_capture(inner):
            model(images())
        pytest.fail("the inner context took the outer's")
    assert outer.pop().keys() == {"backbone.c1"}
    raises(RuntimeError, inner.pop, "got 0")


def test_a_tap_that_ran_too_often_before_the_last_one_is_an_error():
    distiller = Distiller(Net(4), RunsTwice(6), distillation_loss(), LEVELS, early_stop=True)
    raises(RuntimeError, lambda: distiller(images()), "'backbone.c1'", "got 2")
    assert is_at_rest(distiller)


class Guarded(Net):
    """Goes on after any error of its backbone."""

    def forward(self, batch):
        try:
            return super().forward(batch)
        except Exception:
            return self.head(batch.new_zeros(1, 12, 2, 2))


def test_no_teacher_takes_the_early_end_for_an_error():
    distiller = Distiller(Net(4), Guarded(6), distillation_loss(), LEVELS, early_stop=True)
    inside = Inputs(distiller.teacher.head)
    distiller(images())
    assert not inside


def test_the_copy_of_a_distiller_leaves_its_own_teacher_early():
    distiller = make(early_stop=True)
    duplicate = copy.deepcopy(distiller)
    heads = Inputs(distiller.teacher.head), Inputs(duplicate.teacher.head)
    duplicate(images())
    distiller(images())
    assert not any(heads)


def test_two_threads_leave_one_teacher_each_at_its_own_last_tap():
    teacher = Net(6).eval()
    layers = {"c1": "backbone.c1"}, {"c1": "backbone.c2"}
    distillers = [
        Distiller(Net(4), teacher, Seen(), each, early_stop=early_stop)
        for each, early_stop in zip(layers, (True, False), strict=True)
    ]
    together = threading.Barrier(2, timeout=20)

    def wait(module, args):
        together.wait()

    meet = teacher.backbone.c1.register_forward_pre_hook(wait)
    heads = Inputs(teacher.head)

    def run(index):
        distillers[index](images(seed=index))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    meet.remove()
    for index, distiller in enumerate(distillers):
        (path,) = layers[index].values()
        expected = plain_hooks(teacher, [path], partial(teacher, images(seed=index)))[path]
        close(distiller.loss.teacher["c1"], expected, 0.0)
        assert is_at_rest(distiller)
    assert len(heads) == 3


@pytest.mark.slow
@pytest.mark.one_graph
@pytest.mark.parametrize("part", ["teacher", "backbone", "distiller"])
def test_compiled_code_runs_to_its_end_and_gives_the_same(part, fresh_compiler):
    plain = make()
    student, teacher, loss = copy.deepcopy((plain.student, plain.teacher, plain.loss))
    counter = CompileCounterWithBackend("aot_eager")
    if part == "backbone":
        teacher.backbone.compile(fullgraph=True, backend=counter)
    elif part == "teacher":
        teacher = torch.compile(teacher, fullgraph=True, backend=counter)
    distiller = Distiller(student, teacher, loss, LEVELS, early_stop=True)
    distiller.teacher.eval()
    call = distiller
    if part == "distiller":
        call = torch.compile(distiller, fullgraph=True, backend=counter)
    for seed in range(2):
        _, expected = plain(images(seed=seed))
        for name, value in call(images(seed=seed))[1].items():
            close(value, expected[name], 1e-10)
    assert counter.frame_count == 1
