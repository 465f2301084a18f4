"""Taps and the distiller under torch.compile: one graph, the values and gradients of eager."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from featkd import (
    Distiller,
    FeatureDistillationLoss,
    FeatureTap,
    PatchTokens,
    match_layers,
)
from tests.helpers.models import LEVELS, Net, distillation_loss, images
from tests.helpers.tensors import close, normal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]

# torch.compile hides this warning of its own making as it is shown: too late where it is an error.
torch_reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture
def counter():
    """A backend that counts its graphs."""
    return CompileCounterWithBackend("aot_eager")


def step(tap, call, batch):
    """One training step's features and the gradient of their squares and of the output's."""
    parameters = list(tap.model.parameters())
    with tap:
        output = call(batch)
        features = tap.pop()
    total = sum(value.square().mean() for value in [output, *features.values()])
    return [*features.values(), *torch.autograd.grad(total, parameters)]


def agree(ours, expected, tolerance=1e-12):
    for a, b in zip(ours, expected, strict=True):
        close(a, b, tolerance)


# --- taps -----------------------------------------------------------------------------------------


@pytest.mark.one_graph
@pytest.mark.parametrize("clone", [True, False])
@pytest.mark.parametrize("tap_what", ["the model", "the compiled model"])
def test_a_tap_made_first_equals_eager_in_one_graph(tap_what, clone, counter):
    model = Net(inplace=clone)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    tapped = model if tap_what == "the model" else compiled
    tap = FeatureTap(tapped, LEVELS | {"x": "backbone:input"}, clone=clone)
    for seed in range(4):
        expected = step(FeatureTap(plain, tap.layers), plain, images(seed=seed))
        agree(step(tap, compiled, images(seed=seed)), expected)
    assert counter.frame_count == 1


@pytest.mark.one_graph
@pytest.mark.parametrize("path", ["backbone.c1.norm", "backbone.c1.conv"])
def test_an_in_place_operation_behind_the_module_changes_nothing(path):
    model = Net()
    plain = Net(inplace=False)
    plain.load_state_dict(model.state_dict())
    tap = FeatureTap(model, [path])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    agree(step(tap, compiled, images()), step(FeatureTap(plain, [path]), plain, images()))


@pytest.mark.one_graph
def test_calls_between_the_steps_cost_one_graph_and_capture_nothing(counter):
    model = Net()
    tap = FeatureTap(model, LEVELS)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        step(tap, compiled, images())
        compiled(images())
        with pytest.raises(RuntimeError, match="got 0"):
            tap.pop()
    assert counter.frame_count == 2


@pytest.mark.parametrize("tap_what", ["the model", "the compiled model"])
def test_a_tap_made_after_the_first_compiled_call_is_an_error_not_silence(tap_what):
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(images())
    tap = FeatureTap(model if tap_what == "the model" else compiled, LEVELS)
    with tap:
        compiled(images())
        with pytest.raises(RuntimeError, match=r"got 0: .*torch.compiler.reset"):
            tap.pop()
    torch.compiler.reset()
    step(tap, compiled, images())


@pytest.mark.one_graph
@pytest.mark.parametrize("tap_first", [True, False])
def test_a_compiled_part_of_the_model(tap_first, counter):
    model = Net()
    plain = copy.deepcopy(model)
    tap = FeatureTap(model, LEVELS) if tap_first else None
    model.backbone = torch.compile(model.backbone, fullgraph=True, backend=counter)
    tap = tap or FeatureTap(model, LEVELS)
    for _ in range(3):
        agree(step(tap, model, images()), step(FeatureTap(plain, LEVELS), plain, images()))
    assert counter.frame_count == 1


@torch_reads_grad
@pytest.mark.parametrize("side", [0, 1])
def test_what_match_layers_names_in_a_compiled_model_can_be_tapped(side, counter):
    models = [Net(4), Net(6)]
    plain = copy.deepcopy(models)
    models[side] = torch.compile(models[side], backend=counter)  # which has no length
    match = match_layers(*models, images())
    loss = FeatureDistillationLoss(match.student_channels, match.teacher_channels).double()
    found = Distiller(*models, loss, match.layers)(images())
    expected = Distiller(*plain, loss, match_layers(*plain, images()).layers)(images())
    agree(found[1].values(), expected[1].values())


@pytest.mark.one_graph
@torch_reads_grad
def test_stages_compiled_one_by_one(counter):
    model = Net()
    plain = copy.deepcopy(model)
    tap = FeatureTap(model, LEVELS)
    for stage in model.backbone:
        stage.compile(fullgraph=True, backend=counter)
    for _ in range(3):
        agree(step(tap, model, images()), step(FeatureTap(plain, LEVELS), plain, images()))
    assert counter.frame_count == 2


class FiveLevels(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 2, 1).double()

    def forward(self, images):
        return sum(self.head(images + level) for level in range(5))


@pytest.mark.one_graph
@torch_reads_grad
@pytest.mark.parametrize(("compiled", "graphs"), [("", 1), ("head", 5)], ids=["model", "head"])
def test_a_shared_head(compiled, graphs, counter):
    model = FiveLevels()
    plain = copy.deepcopy(model)
    taps = [FeatureTap(net, {"p": "head"}, calls={"p": 5}) for net in (model, plain)]
    model.get_submodule(compiled).compile(fullgraph=True, backend=counter)
    for _ in range(3):
        agree(step(taps[0], model, images()), step(taps[1], plain, images()))
    assert counter.frame_count == graphs


@pytest.mark.one_graph
def test_a_model_compiled_in_place():
    model = Net()
    plain = copy.deepcopy(model)
    tap = FeatureTap(model, LEVELS)
    model.compile(fullgraph=True, backend="aot_eager")
    agree(step(tap, model, images()), step(FeatureTap(plain, LEVELS), plain, images()))


def test_a_copy_of_a_tapped_model_compiles_in_one_graph(counter):
    model = Net()
    tap = FeatureTap(model, LEVELS | {"x": "backbone:input"})
    duplicate = copy.deepcopy(model)
    compiled = torch.compile(duplicate, fullgraph=True, backend=counter)
    with tap:
        for seed in range(2):
            close(compiled(images(seed=seed)), model(images(seed=seed)), 1e-12)
            assert tap.pop().keys() == tap.layers.keys()
    assert counter.frame_count == 1


@pytest.mark.one_graph
def test_a_pickled_copy_of_a_tapped_model_compiles_in_one_graph(counter):
    model = Net()
    tap = FeatureTap(model, LEVELS | {"x": "backbone:input"})
    loaded = pickle.loads(pickle.dumps(model))
    compiled = torch.compile(loaded, fullgraph=True, backend=counter)
    with tap:
        close(compiled(images()), model(images()), 1e-12)
        close(copy.deepcopy(compiled)(images()), model(images()), 1e-12)
    assert counter.frame_count == 1


@pytest.mark.one_graph
def test_inductor():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)).double()
    plain = copy.deepcopy(model)
    tap = FeatureTap(model, ["0"])
    compiled = torch.compile(model, fullgraph=True)
    agree(step(tap, compiled, images()), step(FeatureTap(plain, ["0"]), plain, images()))


class Checkpointed(Net):
    def forward(self, images):
        return self.head(checkpoint(self.backbone, images, use_reentrant=False))


@pytest.mark.one_graph
def test_checkpointing_inside_a_compiled_model(counter):
    model, plain = Checkpointed(), Net()
    plain.load_state_dict(model.state_dict())
    tap = FeatureTap(model, ["head"])
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        agree(step(tap, compiled, images()), step(FeatureTap(plain, ["head"]), plain, images()))
    assert counter.frame_count == 1


@torch_reads_grad
def test_a_compiled_module_inside_checkpointing():
    model, plain = Checkpointed(), Net()
    plain.load_state_dict(model.state_dict())
    tap = FeatureTap(model, LEVELS)
    model.backbone.compile(backend="aot_eager")
    for _ in range(2):
        agree(step(tap, model, images()), step(FeatureTap(plain, LEVELS), plain, images()))
        with tap:
            model(images()).sum().backward()
            assert tap.pop().keys() == LEVELS.keys()


class PatchNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4).double()
        self.block = nn.Tanh()

    def forward(self, image):
        return self.block(self.patches(image).flatten(2).mT)


# The first is compiled as it is, and the others once.
SIZES = [(24, 56), (56, 40), (64, 72)]


@pytest.mark.one_graph
def test_tokens_of_images_of_many_sizes(counter):
    model = PatchNet()
    plain = copy.deepcopy(model)
    taps = [
        FeatureTap(net, {"c": "block"}, convert={"c": PatchTokens(4)}) for net in (model, plain)
    ]
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in SIZES:
        batch = normal(2, 3, *size)
        agree(step(taps[0], compiled, batch), step(taps[1], plain, batch))
    # The second time the hook of the model itself is a graph too, of sizes without a tensor.
    assert counter.frame_count <= 3


# --- the distiller --------------------------------------------------------------------------------


def distill(distiller, call, batch):
    output, losses = call(batch)
    trained = [value for value in distiller.parameters() if value.requires_grad]
    total = output.square().mean() + sum(losses.values())
    return [output, *losses.values(), *torch.autograd.grad(total, trained)]


@pytest.mark.one_graph
@pytest.mark.parametrize("shared_input", [None, "backbone"])
def test_a_compiled_distiller_equals_eager_in_one_graph(shared_input, counter):
    distiller = Distiller(Net(4), Net(6), distillation_loss(), LEVELS, shared_input=shared_input)
    plain = copy.deepcopy(distiller)
    distiller.teacher.eval()
    compiled = torch.compile(distiller, fullgraph=True, backend=counter)
    for seed in range(3):
        agree(
            distill(distiller, compiled, images(seed=seed)),
            distill(plain, plain, images(seed=seed)),
            1e-10,
        )
    assert counter.frame_count == 1


@torch_reads_grad
@pytest.mark.parametrize("shared_input", [None, "backbone"])
def test_a_compiled_distiller_with_graph_breaks_equals_eager(shared_input):
    """Which is how an older torch compiles it."""
    distiller = Distiller(Net(4), Net(6), distillation_loss(), LEVELS, shared_input=shared_input)
    plain = copy.deepcopy(distiller)
    distiller.student.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(distiller, backend="aot_eager")
    for seed in range(2):
        agree(
            distill(distiller, compiled, images(seed=seed)),
            distill(plain, plain, images(seed=seed)),
            1e-10,
        )


@pytest.mark.one_graph
def test_a_compiled_distiller_of_tokens_of_images_of_many_sizes(counter):
    student = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Tanh()).double()
    loss = FeatureDistillationLoss(4, 6, resize="bilinear").double()
    convert = {"c": (None, PatchTokens(4))}
    distiller = Distiller(student, PatchNet(), loss, {"c": ("0", "block")}, convert=convert)
    plain = copy.deepcopy(distiller)
    compiled = torch.compile(distiller, fullgraph=True, backend=counter)
    for size in SIZES:
        batch = normal(2, 3, *size)
        agree(distill(distiller, compiled, batch), distill(plain, plain, batch), 1e-10)
    assert counter.frame_count == 2


@pytest.mark.one_graph
def test_a_compiled_distiller_sets_its_teacher_to_eval():
    distiller = Distiller(Net(4), Net(6), distillation_loss(), LEVELS)
    plain = copy.deepcopy(distiller)
    compiled = torch.compile(distiller, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        distiller.teacher.train()
        agree(
            distill(distiller, compiled, images(seed=seed)),
            distill(plain, plain, images(seed=seed)),
            1e-10,
        )
        assert not any(module.training for module in distiller.teacher.modules())


@pytest.mark.parametrize("shared_input", [None, "backbone"])
def test_a_compiled_student_and_teacher(shared_input):
    plain = Distiller(Net(4), Net(6), distillation_loss(), LEVELS, shared_input=shared_input)
    student, teacher = copy.deepcopy(plain.student), copy.deepcopy(plain.teacher)
    distiller = Distiller(
        torch.compile(student, backend="aot_eager"),
        torch.compile(teacher, backend="aot_eager"),
        copy.deepcopy(plain.loss),
        LEVELS,
        shared_input=shared_input,
    )
    for seed in range(2):
        agree(
            distill(distiller, distiller, images(seed=seed)),
            distill(plain, plain, images(seed=seed)),
            1e-10,
        )


def test_a_compiled_teacher_whose_hooks_never_fire_is_an_error():
    teacher = torch.compile(Net(6), backend="aot_eager")
    with torch.no_grad():
        teacher.eval()(images())
    distiller = Distiller(Net(4), teacher, distillation_loss(), LEVELS)
    with pytest.raises(RuntimeError, match="got 0"):
        distiller(images())
