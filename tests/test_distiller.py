"""Distiller: the student's output untouched, the same pixels, and a teacher that never moves."""

import copy
import io
import pickle
import threading
from functools import partial

import pytest
import torch
from cases import close
from models import (
    LEVELS,
    Net,
    detector,
    detector_images,
    detector_targets,
    detr,
    distillation_loss,
    hook_count,
    images,
    plain_hooks,
    raises,
    rt_detr,
    snapshot,
    timm_backbone,
    unchanged,
    watch,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from featkd import Distiller, FeatureTap, from_tokens
from featkd.taps.early_stop import left_early


def make(student=4, teacher=6, **options):
    return Distiller(
        Net(student), Net(teacher), distillation_loss(student, teacher), LEVELS, **options
    )


class Seen(nn.Module):
    """A loss that keeps what it was given; its gradient reaches every student feature."""

    def forward(self, student, teacher):
        self.student, self.teacher = student, teacher
        return {"seen": sum(feature.square().mean() for feature in student.values())}


class Inputs(list):
    """What enters a module, call by call."""

    def __init__(self, module):
        super().__init__()
        module.register_forward_pre_hook(lambda module, args: self.append(args[0].clone()))


# --- what it returns ------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_input", [None, "backbone"])
def test_the_output_is_the_students_and_the_losses_are_of_plain_hooks(shared_input):
    distiller = make(shared_input=shared_input)
    student, teacher = copy.deepcopy((distiller.student, distiller.teacher))
    features = [
        plain_hooks(model, LEVELS.values(), partial(model, images()))
        for model in (student, teacher.eval())
    ]
    output, losses = distiller(images())
    close(output, copy.deepcopy(student).train()(images()), 0.0)
    ours, theirs = ({level: f[path] for level, path in LEVELS.items()} for f in features)
    expected = distiller.loss(ours, theirs)
    assert losses.keys() == expected.keys()
    for name, value in losses.items():
        close(value, expected[name])


def test_the_gradient_reaches_the_students_backbone_and_the_adapters_alone():
    distiller = make()
    sum(distiller(images())[1].values()).backward()
    for name, parameter in distiller.named_parameters():
        if name.startswith("student.head") or not parameter.requires_grad:
            assert parameter.grad is None, name
        elif not name.endswith("conv.bias"):  # a batch norm takes these away
            assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


def test_another_path_for_each_model():
    student, teacher = Net(4), HasTrunk(6)
    layers = {level: (path, path.replace("backbone", "trunk")) for level, path in LEVELS.items()}
    distiller = Distiller(student, teacher, distillation_loss(), layers)
    assert distiller(images())[1]["non_local"] > 0


class HasTrunk(nn.Module):
    """A `Net` whose backbone has another name."""

    def __init__(self, width):
        super().__init__()
        self.trunk = Net(width).backbone
        self.calls = 0

    def forward(self, images, scale=1):
        self.calls += 1
        return self.trunk(scale * images)


def test_any_module_of_two_mappings_is_a_loss():
    distiller = Distiller(Net(4), Net(6), Seen(), LEVELS)
    _, losses = distiller(images())
    assert losses.keys() == {"seen"}
    assert distiller.loss.teacher.keys() == distiller.loss.student.keys() == LEVELS.keys()


def test_evaluation_without_gradients():
    distiller = make().eval()
    with torch.no_grad():
        output, losses = distiller(images())
    close(output, distiller.student(images()), 0.0)
    assert not any(value.requires_grad for value in losses.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_teacher_of_another_dtype(dtype):
    distiller = Distiller(
        Net(4).float(),
        Net(6).to(dtype),
        distillation_loss().float(),
        LEVELS,
        shared_input="backbone",
    )
    _, losses = distiller(images().float())
    assert all(value.isfinite() for value in losses.values())


def test_autocast():
    distiller = make().float()
    distiller.teacher.float()
    expected = distiller(images().float())[1]
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = distiller(images().float())
    for name, value in losses.items():
        assert value.dtype == torch.float32
        close(value, expected[name], 0.05)


def test_a_frozen_student_is_an_error():
    distiller = make()
    distiller.student.backbone.requires_grad_(False)
    raises(RuntimeError, lambda: distiller(images()), "'backbone.c1'")


# --- other layouts --------------------------------------------------------------------------------


class AsTokens(nn.Module):
    def forward(self, maps):
        tokens = maps.flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, :1], tokens], dim=1)


class AsMaps(nn.Module):
    def forward(self, tokens):
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (8, 12))


class Tokens(Net):
    """A `Net` whose first stage puts out a token that is no position's, then those that are."""

    def __init__(self, width):
        super().__init__(width)
        first, second = self.backbone
        self.backbone.c1 = nn.Sequential(first, AsTokens())
        self.backbone.c2 = nn.Sequential(AsMaps(), second)


from_stage = partial(from_tokens, size=(8, 12), prefix=1)
CONVERTS = {
    "both": (Tokens, Tokens, from_stage),
    "the student's": (Tokens, Net, (from_stage, None)),
    "the teacher's": (Net, Tokens, (None, from_stage)),
    "neither": (Net, Net, (None, None)),
}


@pytest.mark.parametrize("shared_input", [None, "backbone"])
@pytest.mark.parametrize(("student", "teacher", "convert"), CONVERTS.values(), ids=CONVERTS)
def test_tokens_are_converted_for_the_loss(student, teacher, convert, shared_input):
    plain = make(shared_input=shared_input)
    student, teacher = student(4), teacher(6)
    for model, other in ((student, plain.student), (teacher, plain.teacher)):
        values = other.state_dict().values()
        model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    distiller = Distiller(
        student,
        teacher,
        copy.deepcopy(plain.loss),
        LEVELS,
        shared_input=shared_input,
        convert={"c1": convert},
    )
    gradients = []
    for each in (distiller, copy.deepcopy(distiller), plain):
        output, losses = each(images())
        total = output.square().mean() + sum(losses.values())
        trained = [value for value in each.parameters() if value.requires_grad]
        gradients.append([total, *torch.autograd.grad(total, trained)])
    for values in gradients[:2]:
        for ours, expected in zip(values, gradients[2], strict=True):
            close(ours, expected)


def test_no_conversion_is_an_empty_mapping_too():
    assert make(convert={})(images())[1].keys() == make()(images())[1].keys()


# --- the teacher ----------------------------------------------------------------------------------


class Watched(Net):
    """Notes on every call whether it trains and whether gradients are recorded."""

    def __init__(self, width):
        super().__init__(width)
        self.backbone.c2.register_forward_hook(
            lambda module, args, output: self.seen.append(
                (any(m.training for m in self.modules()), output.requires_grad)
            )
        )
        self.seen = []


def train_teacher(distiller):
    distiller.teacher.train()


def train_distiller(distiller):
    distiller.train()


def train_a_part(distiller):
    distiller.teacher.backbone.c1.norm.train()


@pytest.mark.parametrize("shared_input", [None, "backbone"])
@pytest.mark.parametrize("disturb", [train_distiller, train_teacher, train_a_part])
def test_the_teacher_evaluates_and_stays_bit_equal_whatever_is_set_to_train(disturb, shared_input):
    teacher = Watched(6)
    distiller = Distiller(Net(4), teacher, distillation_loss(), LEVELS, shared_input=shared_input)
    optimizer = torch.optim.AdamW(distiller.parameters(), 0.1)
    before, student = snapshot(teacher), snapshot(distiller.student)
    for seed in range(3):
        disturb(distiller)
        output, losses = distiller(images(seed=seed))
        (output.square().mean() + sum(losses.values())).backward()
        optimizer.step()
    assert teacher.seen == [(False, False)] * 3
    assert unchanged(teacher, before)
    assert not unchanged(distiller.student, student)


def test_train_and_eval_of_the_distiller_reach_the_student():
    distiller = make()
    assert distiller.train().student.backbone.c1.training
    assert not distiller.eval().student.backbone.c1.training


def test_the_teacher_is_no_part_of_the_distiller():
    distiller = make()
    teacher = distiller.teacher
    children = {"student": distiller.student, "loss": distiller.loss}
    assert dict(distiller.named_children()) == children
    held = {id(value) for value in [*teacher.parameters(), *teacher.buffers()]}
    assert not held & {id(value) for value in [*distiller.parameters(), *distiller.buffers()]}
    assert not set(teacher.modules()) & set(distiller.modules())
    prefixes = {name.split(".")[0] for name in distiller.state_dict()}
    assert prefixes == {"student", "loss"}
    distiller.float()
    assert next(teacher.parameters()).dtype == torch.float64


def test_the_state_dict_goes_into_another_distiller():
    first, second = make(), make()
    second.load_state_dict(first.state_dict())
    close(second(images())[0], first(images())[0], 0.0)


# --- the same pixels ------------------------------------------------------------------------------


def resizing(name, seed):
    torch.manual_seed(seed)
    return detector(name, min_size=(48, 64, 80, 96), max_size=128)


@pytest.mark.parametrize(
    ("name", "head", "layers"),
    [
        ("mobilenet", "rpn", {"c3": "backbone.body.6"}),
        ("retinanet", "head", {"c3": "backbone.body.layer2"}),
    ],
)
def test_a_detector_that_resizes_at_random_gives_its_pixels_to_the_teachers_backbone(
    name, head, layers
):
    student, teacher = resizing(name, 1).train(), resizing(name, 2)
    distiller = Distiller(student, teacher, Seen(), layers, shared_input="backbone")
    ours, theirs = Inputs(student.backbone), Inputs(teacher.backbone)
    rest = Inputs(teacher.transform), Inputs(teacher.get_submodule(head))
    for _ in range(6):
        distiller(detector_images(), detector_targets())
        assert distiller.loss.student["c3"].shape == distiller.loss.teacher["c3"].shape
    assert len({tensor.shape for tensor in ours}) > 1
    assert all(map(torch.equal, ours, theirs))
    assert len(theirs) == 6
    assert not any(rest)


def test_the_shared_input_comes_in_the_dtype_of_the_part_that_runs():
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)
            self.codes = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
            self.backbone = Net(6).backbone.bfloat16()

    distiller = Distiller(Net(4), HeadFirst(), Seen(), LEVELS, shared_input="backbone")
    ours, theirs = (Inputs(x.backbone) for x in (distiller.student, distiller.teacher))
    distiller(images())
    assert theirs[0].dtype == torch.bfloat16
    assert torch.equal(theirs[0], ours[0].bfloat16())


@pytest.mark.parametrize("wrap", [lambda teacher: teacher, AveragedModel], ids=["bare", "averaged"])
def test_the_shared_input_runs_that_part_of_the_teacher_alone(wrap):
    teacher = Net(6)
    distiller = Distiller(
        Net(4), wrap(teacher), distillation_loss(), LEVELS, shared_input="backbone"
    )
    teacher = getattr(distiller.teacher, "module", distiller.teacher)
    ours, theirs = Inputs(distiller.student.backbone), Inputs(teacher.backbone)
    head = Inputs(teacher.head)
    distiller(images())
    assert torch.equal(ours[0], theirs[0])
    assert not head


def test_the_shared_input_of_a_pair_of_paths():
    teacher = HasTrunk(6)
    layers = {level: (path, path.replace("backbone", "trunk")) for level, path in LEVELS.items()}
    pair = ("backbone", "trunk")
    distiller = Distiller(Net(4), teacher, distillation_loss(), layers, shared_input=pair)
    ours, theirs = Inputs(distiller.student.backbone), Inputs(teacher.trunk)
    distiller(images())
    assert torch.equal(ours[0], theirs[0])
    assert teacher.calls == 0


def test_a_teacher_that_is_a_bare_backbone():
    layers = {"c1": ("backbone.c1", "c1"), "c2": ("backbone.c2", "c2")}
    teacher = Net(6).backbone
    pair = ("backbone", "")
    distiller = Distiller(Net(4), teacher, distillation_loss(), layers, shared_input=pair)
    theirs = Inputs(teacher)
    distiller(images())
    assert torch.equal(theirs[0], images())


def test_the_output_of_the_shared_part_itself_can_be_tapped():
    layers = {"c1": "backbone.c1", "c2": "backbone"}
    distiller = Distiller(Net(4), Net(6), distillation_loss(), layers, shared_input="backbone")
    assert distiller(images())[1]["non_local"] > 0


def test_teacher_forward_replaces_the_call():
    teacher = HasTrunk(6)
    layers = {level: (path, path.replace("backbone", "trunk")) for level, path in LEVELS.items()}

    def forward(model, batch, **options):
        assert model is teacher
        model.trunk(2 * batch)

    distiller = Distiller(Net(4), teacher, distillation_loss(), layers, teacher_forward=forward)
    theirs = Inputs(teacher.trunk)
    distiller(images())
    close(theirs[0], 2 * images(), 0.0)
    assert teacher.calls == 0


def test_with_neither_the_teacher_is_called_as_the_student_is():
    student, teacher = HasTrunk(4), HasTrunk(6)
    layers = {"c1": "trunk.c1", "c2": "trunk.c2"}
    distiller = Distiller(student, teacher, distillation_loss(), layers)
    inputs = Inputs(student.trunk), Inputs(teacher.trunk)
    distiller(images(), scale=3)
    for given in inputs:
        close(given[0], 3 * images(), 0.0)


# --- a teacher that is left early -----------------------------------------------------------------


def call_teacher(teacher, batch):
    return teacher(batch)


CALLS = {
    "as the student": {},
    "shared input": {"shared_input": ""},
    "teacher_forward": {"teacher_forward": call_teacher},
}
each_call = pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)


def values(distiller, batch):
    """The losses and their gradients."""
    _, losses = distiller(batch)
    trained = [value for value in distiller.parameters() if value.requires_grad]
    total = sum(losses.values())
    found = torch.autograd.grad(total, trained, allow_unused=True)
    return [*losses.values(), *(value for value in found if value is not None)]


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
        with left_early(tap):
            run()
        assert len(tap.pop()) == calls
    assert [len(inputs) for inputs in runs] == [calls, 0]


def test_a_forward_is_left_for_the_tap_that_has_it_all():
    model = Net()
    outer, inner = FeatureTap(model, ["backbone.c1"]), FeatureTap(model, ["backbone.c2"])
    with outer, left_early(outer):
        with inner, left_early(inner):
            model(images())
        pytest.fail("the inner context took the outer's")
    assert outer.pop().keys() == {"backbone.c1"}
    raises(RuntimeError, inner.pop, "got 0")


class RunsTwice(Net):
    def forward(self, batch):
        self.backbone.c1(batch)
        return super().forward(batch)


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


# --- copies ---------------------------------------------------------------------------------------


def by_torch_save(distiller):
    file = io.BytesIO()
    torch.save(distiller, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda distiller: pickle.loads(pickle.dumps(distiller)),
    "torch.save": by_torch_save,
    "AveragedModel": lambda distiller: AveragedModel(distiller).module,
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("shared_input", [None, "backbone"])
def test_a_copy_works_on_its_own(make_copy, shared_input):
    distiller = make(shared_input=shared_input)
    distiller(images())
    duplicate = make_copy(distiller)
    assert duplicate.student is not distiller.student
    assert duplicate.teacher is not distiller.teacher
    seen = Inputs(distiller.student), Inputs(distiller.teacher)
    output, losses = duplicate(images())
    assert not any(seen)
    expected_output, expected = distiller(images())
    close(output, expected_output, 0.0)
    for name, value in losses.items():
        close(value, expected[name], 0.0)
    output.sum().backward()
    assert distiller.student.head.weight.grad is None


def test_the_hooks_go_with_the_distiller():
    distiller = make(shared_input="backbone")
    student, teacher = distiller.student, distiller.teacher
    assert hook_count(student) > 0 < hook_count(teacher)
    del distiller
    assert hook_count(student) == hook_count(teacher) == 0


def test_a_replica_of_data_parallel_is_an_error():
    distiller = make()
    replica = distiller._replicate_for_data_parallel()
    replica.student = distiller.student._replicate_for_data_parallel()
    raises(RuntimeError, lambda: replica(images()), "DataParallel")


# --- what a training script does to the student ---------------------------------------------------


class Checkpointed(Net):
    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, images):
        images = images.requires_grad_()
        return self.head(checkpoint(self.backbone, images, use_reentrant=self.use_reentrant))


def test_a_checkpointed_student_has_the_gradients_of_a_plain_one():
    plain = make(shared_input="backbone")
    student = Checkpointed(use_reentrant=False)
    student.load_state_dict(plain.student.state_dict())
    loss, teacher = copy.deepcopy((plain.loss, plain.teacher))
    distiller = Distiller(student, teacher, loss, LEVELS, shared_input="backbone")
    for _ in range(2):
        for each in (plain, distiller):
            output, losses = each(images())
            (output.square().mean() + sum(losses.values())).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in distiller.named_parameters():
        if parameter.requires_grad:
            close(parameter.grad, expected[name].grad)


def test_a_student_with_reentrant_checkpointing_is_an_error():
    student = Checkpointed(use_reentrant=True)
    distiller = Distiller(student, Net(6), distillation_loss(), LEVELS)
    raises(RuntimeError, lambda: distiller(images()), "use_reentrant=False")


@pytest.mark.one_graph
def test_the_student_exports_as_if_it_had_never_been_distilled():
    distiller = make(shared_input="backbone")
    optimizer = torch.optim.SGD(distiller.parameters(), 0.01)
    for _ in range(2):
        output, losses = distiller(images())
        (output.square().mean() + sum(losses.values())).backward()
        optimizer.step()
    student, untouched = distiller.student.eval(), Net().eval()
    untouched.load_state_dict(student.state_dict())
    programs = [torch.export.export(model, (images(),)) for model in (student, untouched)]
    assert str(programs[0]) == str(programs[1])
    close(programs[0].module()(images()), untouched(images()), 0.0)


# --- real models ----------------------------------------------------------------------------------

BODY = {"c3": "backbone.body.layer2", "c4": "backbone.body.layer3"}
BODY_OF_MOBILENET = {
    "c3": ("backbone.body.6", "backbone.body.layer2"),
    "c4": ("backbone.body.12", "backbone.body.layer3"),
}
FEATURES = {"c3": "backbone.features.0.6", "c4": "backbone.features.0.12"}
HF_STAGES = {
    "c3": "model.backbone.model.encoder.stages.1",
    "c4": "model.backbone.model.encoder.stages.2",
}
PYRAMID = {"p3": "backbone[0]", "p4": "backbone[1]"}
detections = detector_images(), detector_targets()
pixels = (images().float().repeat(1, 1, 4, 4),)

REAL = {
    "fasterrcnn": (*[partial(detector, "fasterrcnn")] * 2, BODY, "backbone", detections),
    "retinanet": (*[partial(detector, "retinanet")] * 2, BODY, "backbone", detections),
    "fcos": (*[partial(detector, "fcos")] * 2, BODY, "backbone", detections),
    "pyramid": (
        partial(detector, "fcos"),
        partial(detector, "retinanet"),
        PYRAMID,
        "backbone",
        detections,
    ),
    "mobilenet": (
        partial(detector, "mobilenet"),
        partial(detector, "retinanet"),
        BODY_OF_MOBILENET,
        "backbone",
        detections,
    ),
    "ssdlite": (*[partial(detector, "ssdlite")] * 2, FEATURES, "backbone", detections),
    "detr": (partial(detr, 8, 8, 16, 16), partial(detr, 8, 16, 16, 32), HF_STAGES, None, pixels),
    "rt_detr": (
        partial(rt_detr, 8, 8, 16, 16),
        partial(rt_detr, 8, 16, 16, 32),
        HF_STAGES,
        None,
        pixels,
    ),
    "timm": (
        partial(timm_backbone, "mobilenetv3_small_050"),
        partial(timm_backbone, "convnext_atto"),
        {"c3": ("blocks.1", "stages_1"), "c4": ("blocks.3", "stages_2")},
        None,
        pixels,
    ),
}


def marks(name):
    return [pytest.mark.model_zoo] if name in ("detr", "rt_detr", "timm") else []


@pytest.mark.parametrize(
    ("student", "teacher", "layers", "shared_input", "inputs"),
    [pytest.param(*case, id=name, marks=marks(name)) for name, case in REAL.items()],
)
def test_real_models(student, teacher, layers, shared_input, inputs):
    # transformers freezes DETR's backbone
    student, teacher = student().train().requires_grad_(True), teacher().train()
    distiller = Distiller(student, teacher, Seen(), layers, shared_input=shared_input)
    optimizer = torch.optim.SGD(distiller.parameters(), 1e-4)
    before, names = snapshot(teacher), list(student.state_dict())
    pairs = {level: (p, p) if isinstance(p, str) else p for level, p in layers.items()}
    ours, theirs = ([pair[side] for pair in pairs.values()] for side in (0, 1))
    with watch(student, ours) as student_features, watch(teacher, theirs) as teacher_features:
        _, losses = distiller(*inputs)
    for level, (our_path, their_path) in pairs.items():
        assert torch.equal(distiller.loss.student[level], student_features[our_path])
        assert torch.equal(distiller.loss.teacher[level], teacher_features[their_path])
    sum(losses.values()).backward()
    first = next(parameter for parameter in student.parameters() if parameter.dim() == 4)
    assert first.grad.abs().sum() > 0
    optimizer.step()
    assert unchanged(teacher, before)
    assert list(student.state_dict()) == names
    assert all(parameter.grad is None for parameter in teacher.parameters())


# --- misuse ---------------------------------------------------------------------------------------

TWICE = Net(4)


def build(student=None, teacher=None, loss=None, layers=LEVELS, **options):
    return Distiller(student or Net(4), teacher or Net(6), loss or Seen(), layers, **options)


MISUSE = {
    "student": (TypeError, lambda: build(student="net"), "`student`"),
    "teacher": (TypeError, lambda: build(teacher=print), "`teacher`"),
    "loss": (TypeError, lambda: build(loss=print), "`loss`"),
    "one model": (ValueError, lambda: build(student=TWICE, teacher=TWICE), "the same"),
    "DataParallel student": (TypeError, lambda: build(nn.DataParallel(Net(4))), "DataParallel"),
    "DataParallel teacher": (
        TypeError,
        lambda: build(teacher=nn.DataParallel(Net(6))),
        "DataParallel",
    ),
    "a list of layers": (TypeError, lambda: build(layers=["backbone.c1"]), "list"),
    "a triple": (TypeError, lambda: build(layers={"c1": ("a", "b", "c")}), "layers['c1']"),
    "a number": (TypeError, lambda: build(layers={"c1": 3}), "got 3"),
    "no layers": (ValueError, lambda: build(layers={}), "[]"),
    "unknown in the student": (
        ValueError,
        lambda: build(layers={"c1": ("backbone.c3", "backbone.c1")}),
        "'backbone.c1'",
    ),
    "unknown in the teacher": (
        ValueError,
        lambda: build(layers={"c1": ("backbone.c1", "backbone.c3")}),
        "'backbone.c1'",
    ),
    "levels of another loss": (
        ValueError,
        lambda: build(loss=distillation_loss(), layers={"c1": "backbone.c1"}),
        "['c1', 'c2']",
    ),
    "shared_input of another type": (TypeError, lambda: build(shared_input=1), "`shared_input`"),
    "shared_input unknown": (ValueError, lambda: build(shared_input="bone"), "'bone'"),
    "shared_input unknown in the teacher": (
        ValueError,
        lambda: build(shared_input=("backbone", "bone")),
        "'bone'",
    ),
    "a layer beside shared_input": (
        ValueError,
        lambda: build(layers={"head": "head"}, shared_input="backbone"),
        "'head'",
    ),
    "teacher_forward of another type": (
        TypeError,
        lambda: build(teacher_forward="forward"),
        "`teacher_forward`",
    ),
    "convert of another type": (TypeError, lambda: build(convert=from_stage), "`convert`"),
    "convert of an unknown level": (ValueError, lambda: build(convert={"c3": None}), "'c3'"),
    "convert to None": (TypeError, lambda: build(convert={"c1": None}), "`convert['c1']`"),
    "convert to a triple": (
        TypeError,
        lambda: build(convert={"c1": (None,) * 3}),
        "`convert['c1']`",
    ),
    "convert to no function": (
        TypeError,
        lambda: build(convert={"c1": ("NHWC", None)}),
        "`convert['c1']`",
    ),
    "early_stop of another type": (TypeError, lambda: build(early_stop=1), "`early_stop`"),
    "shared_input and teacher_forward": (
        ValueError,
        lambda: build(shared_input="backbone", teacher_forward=print),
        "'backbone'",
    ),
}


@pytest.mark.parametrize(("error", "call", "mention"), MISUSE.values(), ids=MISUSE)
def test_misuse(error, call, mention):
    raises(error, call, mention)


def test_a_wholly_frozen_student_is_an_error():
    distiller = make()
    distiller.student.requires_grad_(False)
    with pytest.raises(RuntimeError, match="must carry a gradient, got a frozen part"):
        distiller(images())


def test_another_teacher_wants_another_distiller():
    distiller = make()
    with pytest.raises(AttributeError, match="make a new Distiller"):
        distiller.teacher = make().teacher


def sharing(**parts):
    """A distiller whose teacher has these submodules of the student's or the loss's."""
    student, teacher, loss = Net(4), Net(4), distillation_loss(4, 4)
    owner = {"student": student, "loss": loss}
    for name, path in parts.items():
        teacher.add_module("shared", owner[name].get_submodule(path))
    return Distiller(student, teacher, loss, LEVELS)


@pytest.mark.parametrize("path", ["", "backbone.c1"])
def test_a_teacher_that_holds_the_student_or_a_part_of_it_is_an_error(path):
    first = next(
        f"{path}.{name}".lstrip(".") for name, _ in Net(4).get_submodule(path).named_parameters()
    )
    with pytest.raises(ValueError, match=f"share no weights with `student`, got '{first}' in both"):
        sharing(student=path)


def test_a_teacher_that_the_loss_trains_is_an_error():
    with pytest.raises(ValueError, match="`teacher` must share no weights with `loss`"):
        sharing(loss="attention_masked")


def test_a_shared_buffer_is_an_error():
    student, teacher = Net(4), Net(4)
    for model in (student, teacher):
        model.register_buffer("average", torch.zeros(1) if model is student else student.average)
    with pytest.raises(ValueError, match="'average' in both"):
        build(student, teacher)


def test_a_loss_of_one_level_takes_any_name_for_it():
    from featkd import ONE_STAGE, FeatureDistillationLoss

    loss = FeatureDistillationLoss(8, 12, hyperparameters=ONE_STAGE).double()
    student, teacher = (nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU()).double() for c in (8, 12))
    _, losses = Distiller(student, teacher, loss, {"anything": "1"})(images())
    assert losses["attention_masked"] > 0
    with pytest.raises(ValueError, match="`layers` must have the levels of `loss`"):
        Distiller(student, teacher, loss, {"a": "0", "b": "1"})
