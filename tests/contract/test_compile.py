"""torch.compile(fullgraph=True) gives the values and gradients of eager."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._export.verifier import SpecViolationError
from torch.fx.experimental.proxy_tensor import make_fx

import featkd
from tests.helpers.cases import CASES, KINDS
from tests.helpers.module_cases import ALL_TERMS, MODULE_CASES
from tests.helpers.tensors import close, normal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]

INDUCTOR = ["masked-both", "concatenation-keys", "embedded_gaussian-keys"]


def value_and_gradients(call, tensors):
    output = call(*tensors)
    weights = normal(*output.shape, seed=9, dtype=output.dtype)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return [output, *torch.autograd.grad((weights * output).sum(), wanted)]


def agree(call, compiled, tensors, tolerance=1e-10):
    eager = value_and_gradients(call, tensors)
    for a, b in zip(value_and_gradients(compiled, tensors), eager, strict=True):
        assert a.dtype == b.dtype
        close(a, b, tolerance)


def leaves(case, **options):
    return [value.requires_grad_() for value in case.inputs(**options).values()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_functions(case):
    compiled = torch.compile(case.of_one, fullgraph=True, backend="aot_eager")
    agree(case.of_one, compiled, leaves(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_make_fx_traces_of_functions_and_gradients_equals_eager(case):
    def both(*tensors):
        output = case.of_one(*tensors)
        return [output, *torch.autograd.grad(output.square().sum(), tensors)]

    traced = make_fx(both)(*leaves(case))
    others = leaves(case, seed=1)
    for a, b in zip(traced(*others), both(*others), strict=True):
        close(a, b)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in INDUCTOR], ids=str)
def test_functions_by_inductor(case):
    compiled = torch.compile(case.of_one, fullgraph=True)
    agree(case.of_one, compiled, leaves(case, dtype=torch.float32), 1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in INDUCTOR], ids=str)
def test_inductor_does_not_hide_nan(case):
    compiled = torch.compile(case.of_one, fullgraph=True)
    for index in range(len(case.inputs())):
        tensors = list(case.inputs(1, (2, 3), torch.float32).values())
        tensors[index].view(-1)[-1] = math.nan
        expected = case.of_one(*tensors).isnan()
        assert expected.any()
        assert compiled(*tensors)[expected].isnan().all()


TOTAL = next(case for case in MODULE_CASES if case.name == "total")


@pytest.mark.parametrize(
    ("case", "backend"),
    [*((case, "aot_eager") for case in MODULE_CASES), (TOTAL, "inductor")],
    ids=str,
)
def test_modules(case, backend):
    module, (student, teacher) = case.module(), case.features()
    parameters = [p for p in module.parameters() if p.requires_grad]
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    tensors = [student.requires_grad_(), teacher]
    eager = torch.autograd.grad(module(*tensors).sum(), [student, *parameters])
    value = compiled(*tensors)
    close(value, module(*tensors))
    gradients = torch.autograd.grad(value.sum(), [student, *parameters])
    for a, b in zip(gradients, eager, strict=True):
        close(a, b)


@pytest.mark.parametrize("loss", ["transfer", "masked-both", "non_local"], ids=str)
def test_equal_features_have_gradient_0(loss):
    case = next(case for case in CASES if case.name == loss)
    compiled = torch.compile(case.of_one, fullgraph=True, backend="aot_eager")
    first, _, *masks = case.inputs().values()
    student = first.requires_grad_()
    value, gradient = value_and_gradients(compiled, [student, first.detach(), *masks])
    close(value, 0.0, 0.0)
    close(gradient, torch.zeros_like(gradient), 0.0)


def test_the_overall_loss_by_level_returns_its_dict():
    channels = {"c3": 4, "layer.4": 6}
    loss = featkd.FeatureDistillationLoss(channels, channels, hyperparameters=ALL_TERMS).double()
    student = {"c3": normal(2, 4, 4, 6, seed=1), "layer.4": normal(2, 6, 2, 3, seed=2)}
    teacher = {"c3": normal(2, 4, 4, 6, seed=3), "layer.4": normal(2, 6, 2, 3, seed=4)}
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher)
    for name, value in loss(student, teacher).items():
        close(compiled[name], value)


def test_another_size_recompiles_at_most_once():
    """Multi-scale training: after the second size, the graph takes any."""
    counter = CompileCounter()
    module = TOTAL.module()
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for height, width in [(4, 6), (8, 10), (6, 14), (12, 8)]:
        features = TOTAL.features(positions=(height, width))
        close(compiled(*features), module(*features))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_relation_of_few_pairs_and_of_many_are_one_graph(kind):
    """In eager mode they are computed in other ways."""
    counter = CompileCounter()
    module = featkd.NonLocalRelation(4, kind=kind)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for size in (3, 48):  # 2 images: 162 pairs, 10 million
            features = normal(2, 4, size, size, dtype=torch.float32)
            close(compiled(features), module(features), 1e-5)
    assert counter.frame_count == 1


def test_autocast_changes_nothing():
    module, features = TOTAL.module().float(), TOTAL.features(dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = module(*features)
    with torch.autocast("cpu", torch.bfloat16):
        value = compiled(*features)
    assert value.dtype == torch.float32
    close(value, expected, 1e-6)


exports_no_autocast = pytest.mark.xfail(
    torch.__version__.startswith("2.4."),
    raises=SpecViolationError,
    strict=True,
    reason="this torch exports no region without autocast",
)


@exports_no_autocast
def test_autocast_changes_nothing_of_an_exported_loss():
    module = featkd.AttentionMaskedLoss(4, 6, temperature=0.5)
    features = normal(2, 4, 3, 5, seed=1).float(), normal(2, 6, 3, 5, seed=2).float()
    exported = torch.export.export(module, features).module()
    with torch.autocast("cpu", torch.bfloat16):
        value = exported(*features)
    close(value, module(*features), 1e-6)


class OfTheModel(torch.nn.Module):
    """A function of what a model puts out, as it would be exported with it."""

    def forward(self, features):
        return featkd.standardize(torch.nn.functional.silu(features))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_exported_function_refuses_narrow_features_or_computes_in_float32(dtype):
    """Which of the two is torch's choice; a narrow result is neither."""
    features = 300 * normal(1, 3, 8, 8, dtype=torch.float32)
    exported = torch.export.export(OfTheModel(), (features,)).module()
    expected = OfTheModel()(features.to(dtype))
    said, value = "", expected
    try:
        value = exported(features.to(dtype))
    except RuntimeError as error:
        said = str(error)
    assert "dtype mismatch" in said or value is not expected
    assert value.dtype == torch.float32
    close(value, expected, 1e-5)


@exports_no_autocast
def test_an_exported_softmax_relation_takes_any_number_of_pairs():
    module = featkd.NonLocalRelation(4, kind="embedded_gaussian")
    sizes = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    given = (normal(2, 4, 8, 9, dtype=torch.float32),)
    exported = torch.export.export(module, given, dynamic_shapes=(sizes,)).module()
    features = normal(2, 4, 40, 41, dtype=torch.float32)
    with torch.no_grad():
        close(exported(features), module(features), 1e-5)


def test_bad_input_is_reported_by_the_compiled_function_too():
    compiled = torch.compile(featkd.non_local_loss, backend="aot_eager")
    with pytest.raises(ValueError, match="`student_relation` must"):
        compiled(torch.ones(1, 2, 3), torch.ones(1, 2, 4))
