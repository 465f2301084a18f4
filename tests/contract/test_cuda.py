"""Every loss and the distiller on the GPU; the same tests run on the CPU, so that CI runs them."""

import copy
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn

import featkd
from benchmarks.measure import peak_bytes
from featkd.losses._options import RESIZE_MODES
from tests.helpers.cases import CASES, KINDS
from tests.helpers.module_cases import MODULE_CASES
from tests.helpers.tensors import close, gradients, leaves, trained

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
WITHOUT_ADAPTERS = [case for case in CASES if not case.adapters]
MAPS = {"c3": (8, 16), "c4": (16, 32)}


def value_and_gradients(case, dtype, device):
    tensors = [x.to(device).requires_grad_() for x in case.inputs(dtype=dtype).values()]
    output = case.of_one(*tensors)
    return output, torch.autograd.grad(output.square().sum(), tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", WITHOUT_ADAPTERS, ids=str)
def test_float32_is_near_float64(case, device):
    output, gradients = value_and_gradients(case, torch.float32, device)
    expected, expected_gradients = value_and_gradients(case, torch.float64, "cpu")
    close(output.cpu(), expected, 1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        close(gradient.cpu(), wanted, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", WITHOUT_ADAPTERS, ids=str)
def test_float64_is_the_loops(case, device):
    tensors = case.inputs()
    output = case(**{name: value.to(device) for name, value in tensors.items()})
    close(output.cpu(), case.expected(**tensors))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", MODULE_CASES, ids=str)
def test_a_module_is_its_functions_on_the_cpu(case, device):
    def value_and_gradients(function, module, device):
        student, teacher = (value.to(device) for value in case.features())
        value = function(student.requires_grad_(), teacher)
        return value, *gradients(value, [student, *trained(module)])

    module = case.module()
    expected = value_and_gradients(partial(case.by_functions, module), module, "cpu")
    module.to(device)
    for found, wanted in zip(value_and_gradients(module, module, device), expected, strict=True):
        close(found.cpu(), wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", MODULE_CASES, ids=str)
def test_no_image_is_no_loss(case, device):
    module = case.module().to(device)
    student, teacher = (value.to(device) for value in case.features(batch=0))
    value = module(student.requires_grad_(), teacher)
    assert not value.sum()
    for gradient in gradients(value, [student, *trained(module)]):
        assert not gradient.any()


@pytest.fixture(params=[False, True], ids=["float32", "tf32"])
def tf32(request):
    """Whether convolutions (as torch is shipped) and matrix products may take TF32."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = request.param
    yield request.param
    for switch, allowed in zip(switches, before, strict=True):
        switch.allow_tf32 = allowed


@pytest.mark.parametrize("device", DEVICES)
def test_under_tf32_the_factors_of_a_product_keep_ten_bits(device, tf32):
    transfer = featkd.AttentionTransferLoss(256, 128)
    masked = featkd.AttentionMaskedLoss(256, 128, temperature=None)
    features = torch.randn(2, 256, 13, 21)
    # Each with how many products stand one behind the other.
    for function, inputs, chained in (
        (masked.adapter, [features], 1),
        (transfer.spatial_adapter, [features[:, :1]], 1),
        (transfer.channel_adapter, [features.mean((2, 3))], 1),
        (featkd.dot_product_relation, [features] * 3, 2),
    ):
        exact, size = copy.deepcopy(function), copy.deepcopy(function)
        if isinstance(function, nn.Module):
            exact, function = exact.double(), function.to(device)
            for parameter in size.double().parameters():
                parameter.data.abs_()
        expected = exact(*(x.double() for x in inputs))
        size = size(*(x.double().abs() for x in inputs))
        error = function(*(x.to(device) for x in inputs)).cpu() - expected
        # Of two factors each is off by 2^-10 of itself; else the additions cost the digits.
        assert (error.abs() <= chained * (2**-9 if tf32 else 2**-16) * size).all()


@pytest.mark.parametrize("device", DEVICES)
def test_under_tf32_equal_features_are_near_zero_loss(device, tf32):
    loss = featkd.FeatureDistillationLoss(64, 64).to(device)
    features = torch.randn(2, 64, 13, 21, device=device)
    assert sum(loss(features, features).values()) <= (2**-18 if tf32 else 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_holds_no_matrix_of_pairs(dtype, device):
    positions = 4096 if device == "cpu" else 16384
    tensors = [torch.randn(1, 16, positions, dtype=dtype, device=device) for _ in range(3)]
    tensors = leaves(tensors)

    def run():
        torch.autograd.grad(featkd.embedded_gaussian_relation(*tensors).sum(), tensors)

    held = peak_bytes(run, torch.device(device))
    assert held < positions**2 * dtype.itemsize / 4


def pyramid(width):
    backbone = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, 8, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()),
    )
    return nn.Sequential(OrderedDict(backbone=backbone))


def make_distiller(device, shared_input=None, **options):
    torch.manual_seed(0)
    settings = featkd.Hyperparameters(1.0, 1.0, 1.0, 0.5, **options)
    channels = zip(*MAPS.values(), strict=True)
    loss = featkd.FeatureDistillationLoss(
        *(dict(zip(MAPS, counts, strict=True)) for counts in channels), hyperparameters=settings
    )
    layers = {"c3": "backbone.0", "c4": "backbone.1"}
    distiller = featkd.Distiller(pyramid(8), pyramid(16), loss, layers, shared_input=shared_input)
    distiller.teacher.to(device)
    return distiller.to(device)


def losses_and_gradient(distiller, images, **autocast):
    distiller.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, **autocast):
        output, losses = distiller(images)
    total = sum(losses.values())
    (total + output.square().mean()).backward()
    return total.detach(), torch.cat([p.grad.flatten() for p in distiller.student.parameters()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["dot_product", "concatenation", "embedded_gaussian"])
def test_amp_keeps_the_loss_near_full_precision(kind, device):
    distiller = make_distiller(device, kind=kind)
    images = torch.randn(2, 3, 64, 96, device=device)
    full, full_gradient = losses_and_gradient(distiller, images, enabled=False)
    half, half_gradient = losses_and_gradient(distiller, images)
    assert half.dtype == torch.float32
    assert abs(half - full) < 0.02 * full
    assert torch.nn.functional.cosine_similarity(full_gradient, half_gradient, 0) > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_for_little_overhead_equals_eager(device, fresh_compiler):
    distiller = make_distiller(device)
    images = torch.randn(2, 3, 64, 96, device=device)
    eager = losses_and_gradient(distiller, images, enabled=False)
    compiled = torch.compile(distiller, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # warm-up, recording and replay of a CUDA graph
        distiller.zero_grad()
        output, losses = compiled(images)
        total = sum(losses.values())
        (total + output.square().mean()).backward()
    gradient = torch.cat([p.grad.flatten() for p in distiller.student.parameters()])
    close(total.cpu(), eager[0].cpu(), 1e-5)
    close(gradient.cpu(), eager[1].cpu(), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "preset"),
    [
        ("cpu", "STANDARDIZED"),
        pytest.param("cuda", "STANDARDIZED", marks=pytest.mark.cuda),
        pytest.param("cuda", "FPN_OUTPUTS", marks=pytest.mark.cuda),
    ],
)
def test_five_levels_compiled_for_little_overhead_equal_eager(device, preset, fresh_compiler):
    channels = {f"p{index}": 16 for index in range(3, 8)}
    loss = featkd.FeatureDistillationLoss(channels, channels, getattr(featkd, preset)).to(device)
    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # new features each time: a replay must not go on with the recorded ones
        student, teacher = (
            {
                level: torch.randn(2, 16, 40 >> index, 56 >> index, device=device)
                for index, level in enumerate(channels)
            }
            for _ in range(2)
        )
        found = []
        for function in (loss, compiled):
            student = leaves(student)
            value = sum(function(student, teacher).values())
            found.append((value, *gradients(value, [*student.values(), *trained(loss)])))
        for expected, actual in zip(*found, strict=True):
            close(actual.cpu(), expected.cpu(), 1e-4)


@pytest.mark.cuda
def test_a_side_stream_gives_the_same_loss():
    distiller = make_distiller("cuda")
    images = torch.randn(2, 3, 64, 96, device="cuda")
    expected, gradient = losses_and_gradient(distiller, images, enabled=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found, found_gradient = losses_and_gradient(distiller, images, enabled=False)
    torch.cuda.current_stream().wait_stream(stream)
    close(found.cpu(), expected.cpu(), 1e-6)
    close(found_gradient.cpu(), gradient.cpu(), 1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("shared_input", [None, "backbone"])
def test_a_teacher_on_the_cpu_gives_its_features_to_a_student_on_the_gpu(shared_input):
    distiller = make_distiller("cuda", shared_input)
    images = torch.randn(2, 3, 64, 96, device="cuda")
    beside, gradient_beside = losses_and_gradient(distiller, images, enabled=False)
    distiller.teacher.cpu()
    total, gradient = losses_and_gradient(distiller, images, enabled=False)
    # The teacher's convolutions take TF32 on the GPU alone.
    close(total.cpu(), beside.cpu(), 1e-3)
    close(gradient.cpu(), gradient_beside.cpu(), 1e-2)


@pytest.mark.cuda
def test_features_on_two_devices_are_an_error():
    maps = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match="must be on the device of `teacher` cuda:0, got cpu"):
        featkd.attention_masked_loss(maps, maps.cuda())


@pytest.fixture
def deterministic_algorithms(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def repeats(function):
    first, *others = (function() for _ in range(3))
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("case", WITHOUT_ADAPTERS, ids=str)
def test_functions_repeat_bit_for_bit(case, deterministic_algorithms):
    def run():
        output, gradients = value_and_gradients(case, torch.float32, "cuda")
        return output, *gradients

    assert repeats(run)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_the_distiller_repeats_bit_for_bit(kind, deterministic_algorithms):
    distiller = make_distiller("cuda", kind=kind)
    images = torch.randn(2, 3, 64, 96, device="cuda")
    assert repeats(lambda: losses_and_gradient(distiller, images, enabled=False))


@pytest.mark.cuda
@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_a_resized_loss_repeats_bit_for_bit_or_torch_says_why_not(mode, deterministic_algorithms):
    loss = featkd.FeatureDistillationLoss(8, 8, resize=mode).cuda()
    maps = torch.randn(2, 8, 26, 38, device="cuda"), torch.randn(2, 8, 13, 19, device="cuda")

    def run():
        student = leaves(maps[:1])
        value = sum(loss(*student, maps[1]).values())
        return value, *gradients(value, student)

    if mode in ("area", "bicubic"):
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            run()
    else:
        assert repeats(run)
