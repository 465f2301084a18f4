"""Every loss and the distiller on the GPU; the same tests run on the CPU, so that CI runs them."""

import pytest
import torch
from torch import nn

import featkd
from tests.helpers.cases import CASES, KINDS
from tests.helpers.tensors import close

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
MAPS = {"c3": (8, 16), "c4": (16, 32)}


def value_and_gradients(case, dtype, device):
    tensors = [x.to(device).requires_grad_() for x in case.inputs(dtype=dtype).values()]
    output = case.of_one(*tensors)
    return output, torch.autograd.grad(output.square().sum(), tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [case for case in CASES if not case.adapters], ids=str)
def test_float32_is_near_float64(case, device):
    output, gradients = value_and_gradients(case, torch.float32, device)
    expected, expected_gradients = value_and_gradients(case, torch.float64, "cpu")
    close(output.cpu(), expected, 1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        close(gradient.cpu(), wanted, 1e-4)


def pyramid(width):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, 8, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()),
    )


def make_distiller(device, **options):
    torch.manual_seed(0)
    settings = featkd.Hyperparameters(1.0, 1.0, 1.0, 0.5, **options)
    channels = zip(*MAPS.values(), strict=True)
    loss = featkd.FeatureDistillationLoss(
        *(dict(zip(MAPS, counts, strict=True)) for counts in channels), hyperparameters=settings
    )
    distiller = featkd.Distiller(pyramid(8), pyramid(16), loss, {"c3": "0", "c4": "1"})
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
def test_a_teacher_on_the_cpu_gives_its_features_to_a_student_on_the_gpu():
    distiller = make_distiller("cuda")
    distiller.teacher.cpu()
    total, _ = losses_and_gradient(distiller, torch.randn(2, 3, 64, 96, device="cuda"))
    assert total.isfinite()


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
@pytest.mark.parametrize("case", [case for case in CASES if not case.adapters], ids=str)
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
