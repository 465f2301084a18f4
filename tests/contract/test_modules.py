"""Every module: equal to its function, well-behaved as a module, and stable to train."""

import copy
import dataclasses
import io
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

import featkd
from featkd import (
    AttentionMask,
    AttentionMaskedLoss,
    AttentionTransferLoss,
    ChannelAttention,
    FeatureDistillationLoss,
    Hyperparameters,
    NonLocalLoss,
    NonLocalRelation,
    SpatialAttention,
)
from featkd.losses._adapters import BatchNorm2d, Conv2d, Linear
from featkd.losses._options import RESIZE_MODES
from featkd.losses.attention import MAPS
from tests.helpers.cases import (
    ALL_TERMS,
    FUSIONS,
    KINDS,
    MODULE_CASES,
    SumOfTerms,
    close,
    normal,
    randomize,
    relation_by_functions,
)

each_case = pytest.mark.parametrize("case", MODULE_CASES, ids=str)
APART = [case for case in MODULE_CASES if case.images_apart]
each_kind = pytest.mark.parametrize("kind", KINDS)

# torch has no batching rule for its fused attention kernels yet: it loops, and says so.
torch_loops = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

torch_scripts = pytest.mark.filterwarnings(  # torch's own, in forward mode
    "ignore:.torch.jit.script. is deprecated:FutureWarning"
)

PLAIN = {
    "SpatialAttention": (SpatialAttention(absolute=False), "absolute=False"),
    "ChannelAttention": (ChannelAttention(absolute=False), "absolute=False"),
    "AttentionMask": (AttentionMask(0.3, "probabilities"), "probabilities"),
    "NonLocalRelation": (NonLocalRelation(4, kind="concatenation", subsample=2), "concatenation"),
}


def leaves(features):
    return [value.detach().clone().requires_grad_() for value in features]


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def gradients(value, inputs):
    return torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True)


# --- a module stores arguments and calls its function ---------------------------------------------


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize(
    ("module", "function"),
    [
        (SpatialAttention, featkd.spatial_attention),
        (ChannelAttention, featkd.channel_attention),
    ],
)
def test_attention_modules_equal_their_functions(module, function, absolute):
    features = normal(2, 3, 4, 5)
    close(module(absolute=absolute)(features), function(features, absolute=absolute), 0.0)
    close(module()(features), function(features), 0.0)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_mask_module_equals_its_function(fusion):
    maps = normal(2, 4, 5, seed=1), normal(2, 4, 5, seed=2)
    expected = featkd.attention_mask(*maps, temperature=0.3, fusion=fusion)
    close(AttentionMask(0.3, fusion)(*maps), expected, 0.0)
    close(AttentionMask(0.3, fusion=fusion)(*maps), expected, 0.0)
    assert AttentionMask(0.3).fusion == "logits"


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("subsample", [1, 2])
@each_kind
def test_the_relation_module_equals_its_function(kind, subsample, residual):
    block = NonLocalRelation(4, kind=kind, subsample=subsample, residual=residual).double()
    features = normal(2, 4, 4, 6)
    relation = block(features)
    assert relation.shape == (2, 4 if residual else 2, 4, 6)
    close(relation, relation_by_functions(block, features))


@each_case
def test_a_loss_module_equals_its_functions(case):
    module, (student, teacher) = case.module(), leaves(case.features())
    expected = case.by_functions(module, student, teacher)
    actual = module(student, teacher)
    assert actual.shape == expected.shape
    close(actual, expected)
    wanted = [student, *trained(module)]
    for a, b in zip(gradients(actual, wanted), gradients(expected, wanted), strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("absolute", "teacher_channels", "readings"),
    [(True, 4, 2), (True, 3, 3), (False, 4, 4)],  # 3: M_c is of the adapted student
)
def test_transfer_and_masks_share_one_reading_of_each_side(
    absolute, teacher_channels, readings, monkeypatch
):
    read = []
    for module in (featkd.losses.overall, featkd.losses.masked, featkd.losses.transfer):

        def counted(features, *options, maps=module.attention_maps):
            read.append(features)
            return maps(features, *options)

        monkeypatch.setattr(module, "attention_maps", counted)
    settings = dataclasses.replace(ALL_TERMS, absolute=absolute)
    loss = FeatureDistillationLoss(4, teacher_channels, hyperparameters=settings)
    loss(torch.ones(2, 4, 3, 5), torch.ones(2, teacher_channels, 3, 5))
    assert len(read) == readings


@pytest.mark.parametrize("inter_channels", [None, 1, 7])
@each_kind
def test_channels_of_a_relation(kind, inter_channels):
    for channels, default in ((1, 1), (4, 2), (7, 3)):
        block = NonLocalRelation(channels, kind=kind, inter_channels=inter_channels)
        assert block(torch.zeros(1, channels, 2, 3)).shape == (1, inter_channels or default, 2, 3)


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_relation_of_few_channels_embeds_them_in_one(channels):
    assert NonLocalRelation(channels, kind="embedded_gaussian").inter_channels == 1


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_a_convolution_of_odd_size_keeps_the_map_s_and_starts_as_the_identity(kernel_size):
    features = normal(2, 3, 6, 7)
    close(Conv2d(3, 3, kernel_size)(features), features, 0.0)


def test_features_wider_than_the_parameters_are_not_rounded():
    features = normal(2, 3, 6, 7)
    close(Conv2d(3, 3, 1).half()(features), features, 0.0)
    close(Linear(3, 3).half()(features[:, :, 0, 0]), features[:, :, 0, 0], 0.0)


def test_adapters_are_those_of_appendix_b():
    transfer = AttentionTransferLoss(4, 3)
    assert transfer.spatial_adapter.weight.shape == (1, 1, 3, 3)
    assert transfer.channel_adapter.weight.shape == (3, 4)
    assert AttentionMaskedLoss(4, 3, temperature=1.0).adapter.weight.shape == (3, 4, 1, 1)
    assert NonLocalLoss(8, 6, kind="gaussian").adapter.weight.shape == (3, 4, 1, 1)
    residual = NonLocalLoss(8, 6, kind="gaussian", residual=True)
    assert residual.adapter.weight.shape == (6, 8, 1, 1)


@pytest.mark.parametrize(
    ("attention", "built"), [("spatial", "spatial_adapter"), ("channel", "channel_adapter")]
)
def test_an_attention_that_is_left_out_has_no_adapter(attention, built):
    names = {
        name.split(".")[0] for name in AttentionTransferLoss(4, 3, attention=attention).state_dict()
    }
    assert names == {built}


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3)])
@pytest.mark.parametrize("case", [c for c in MODULE_CASES if c.teacher_channels == 4], ids=str)
def test_equal_features_start_at_0(case, size):
    student, _ = leaves(case.features(positions=size))
    module = case.module(seed=None)
    value = module(student, student.detach())
    close(value, torch.zeros_like(value), 0.0)
    for gradient in gradients(value, [student, *trained(module)]):
        close(gradient, torch.zeros_like(gradient), 0.0)


@each_kind
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("teacher_relation", ["fixed", "trained"])
def test_equal_features_start_at_relation_distance_0(kind, residual, teacher_relation):
    features = normal(2, 4, 3, 5, dtype=torch.float32)
    loss = NonLocalLoss(4, 4, kind=kind, residual=residual, teacher_relation=teacher_relation)
    close(loss(features, features), 0.0, 0.0)
    assert loss(features, features.flip(-1)) > 0


# --- the released block: W with a batch normalisation ---------------------------------------------


def normalised_block(channels=4, **options):
    return NonLocalRelation(
        channels, kind="dot_product", residual=True, batch_norm=True, **options
    ).double()


def test_a_batch_normalisation_starts_as_the_identity_of_its_block():
    features = normal(2, 4, 3, 5)
    for training in (True, False):
        close(normalised_block().train(training)(features), features, 0.0)
    loss = NonLocalLoss(
        4, 4, kind="dot_product", residual=True, batch_norm=True, teacher_relation="trained"
    )
    other = normal(2, 4, 3, 5, seed=1)
    close(loss.double()(features, other), featkd.non_local_loss(features, other))


def test_a_batch_normalisation_is_torch_s_own_but_for_its_start():
    layer, plain = BatchNorm2d(4).double(), nn.BatchNorm2d(4).double()
    assert not layer.weight.any()
    assert not layer.bias.any()
    randomize(layer)
    layer.num_batches_tracked.zero_()
    plain.load_state_dict(layer.state_dict())
    for training in (True, True, False):
        features = [normal(2, 4, 3, 5, seed=7).requires_grad_() for _ in range(2)]
        ours, torchs = (
            each.train(training)(x) for each, x in zip((layer, plain), features, strict=True)
        )
        close(ours, torchs, 0.0)
        for a, b in zip(
            gradients(ours.square(), [features[0], *layer.parameters()]),
            gradients(torchs.square(), [features[1], *plain.parameters()]),
            strict=True,
        ):
            close(a, b, 0.0)
        for name, value in plain.state_dict().items():
            close(layer.state_dict()[name], value, 0.0)
    layer.reset_parameters()
    assert not layer.weight.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_narrow_batch_normalisation_keeps_its_statistics_of_wide_features(dtype):
    layer, plain = BatchNorm2d(4), nn.BatchNorm2d(4).double()
    randomize(layer)
    layer = layer.to(dtype)
    plain.load_state_dict(layer.state_dict())
    features = normal(2, 4, 3, 5)
    for _ in range(2):
        close(layer(features), plain(features))
    assert layer.running_var.dtype == dtype
    assert layer.num_batches_tracked == plain.num_batches_tracked
    for name in ("running_mean", "running_var"):
        close(getattr(layer, name), getattr(plain, name), 2 * torch.finfo(dtype).eps)


def test_a_single_value_a_channel_is_its_own_mean():
    """torch refuses it; its variance is no estimate, so that the kept statistics stay."""
    layer = BatchNorm2d(4).double()
    randomize(layer)
    before = copy.deepcopy(layer.state_dict())
    features = normal(1, 4, 1, 1).requires_grad_()
    value = layer(features)
    close(value, layer.bias[None, :, None, None], 0.0)
    close(gradients(value, [features])[0], torch.zeros_like(features), 0.0)
    assert layer(features * math.nan).isnan().all()
    for name, kept in layer.state_dict().items():
        close(kept, before[name], 0.0)
    assert layer.eval()(features).ne(value).all()


def test_an_empty_batch_leaves_the_kept_statistics():
    block = normalised_block()
    assert block(torch.zeros(0, 4, 3, 5).double()).shape == (0, 4, 3, 5)
    assert not block.norm_out.running_mean.any()
    assert (block.norm_out.running_var == 1).all()


@torch_scripts
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_the_released_block(training):
    block = normalised_block().train(training)
    randomize(block)
    features = normal(2, 4, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(block, (features,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(block, (features,))


def test_a_released_block_that_is_asked_twice_has_both_gradients():
    block = normalised_block()
    randomize(block)
    first, second = (normal(2, 4, 3, 5, seed=seed) for seed in (1, 2))
    together = gradients(block(first).sum() + block(second).square().sum(), trained(block))
    apart = [gradients(x, trained(block)) for x in (block(first), block(second).square())]
    for both, a, b in zip(together, *apart, strict=True):
        close(both, a + b)


def test_both_released_blocks_are_trained():
    student, teacher = mismatched()
    loss = NonLocalLoss(
        4, 6, kind="dot_product", teacher_relation="trained", residual=True, batch_norm=True
    )
    start = copy.deepcopy(loss.state_dict())
    train(loss, student, teacher, lr=0.05)
    moved = [name for name, value in loss.state_dict().items() if not value.equal(start[name])]
    assert {name for name in start if "relation" in name} <= set(moved)
    assert loss.teacher_relation(teacher).norm() > 0.3 * teacher.norm()


def test_a_sync_batch_norm_conversion_keeps_the_start():
    block = nn.SyncBatchNorm.convert_sync_batchnorm(normalised_block())
    assert isinstance(block.norm_out, nn.SyncBatchNorm)
    assert not block.norm_out.weight.any()


# --- good manners ---------------------------------------------------------------------------------


@each_case
def test_pickle_deepcopy_and_state_dict(case):
    module, features = case.module(), case.features()
    expected = module(*features)
    close(pickle.loads(pickle.dumps(module))(*features), expected, 0.0)
    close(copy.deepcopy(module)(*features), expected, 0.0)
    fresh = case.module(seed=1)
    assert not torch.equal(fresh(*features), expected)
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    close(fresh(*features), expected, 0.0)


@pytest.mark.parametrize(("module", "option"), PLAIN.values(), ids=PLAIN)
def test_pickle_and_repr_of_the_maps(module, option):
    assert option in repr(module)
    features = [torch.rand(2, 4, 4, 6)] * (2 if isinstance(module, AttentionMask) else 1)
    close(pickle.loads(pickle.dumps(module))(*features), module(*features), 0.0)
    close(copy.deepcopy(module)(*features), module(*features), 0.0)
    assert (module.state_dict() == {}) == (not isinstance(module, NonLocalRelation))


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (AttentionTransferLoss(4, 3, reduction="sum"), ["4, 3", "sum"]),
        (AttentionMaskedLoss(4, 3, temperature=0.7, attention="channel"), ["0.7", "channel"]),
        (NonLocalLoss(4, 3, kind="gaussian"), ["gaussian", "teacher_relation='fixed'"]),
        (
            NonLocalLoss(4, 3, kind="gaussian", teacher_relation="trained"),
            ["teacher_relation='trained'"],
        ),
        (NonLocalRelation(4, kind="gaussian", residual=True, batch_norm=True), ["batch_norm=True"]),
        (FeatureDistillationLoss(4, 3, hyperparameters=ALL_TERMS), ["alpha=0.5", "gamma=3.0"]),
    ],
)
def test_repr_names_the_arguments(module, options):
    for option in options:
        assert option in repr(module)


@each_case
def test_the_gradient_reaches_student_and_adapters_only(case):
    module, (student, teacher) = case.module(), leaves(case.features())
    module(student, teacher).sum().backward()
    assert student.grad.any()
    assert teacher.grad is None
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


@each_case
@pytest.mark.parametrize("side", [0, 1])
def test_a_side_that_was_run_under_inference_mode_gives_the_same(case, side):
    module, features = case.module(), leaves(case.features())
    value = module(*features)
    with torch.inference_mode():
        frozen = [x.clone() if index == side else x for index, x in enumerate(features)]
    found = module(*frozen)
    close(found, value, 0.0)
    wanted = [features[1 - side], *trained(module)]
    for a, b in zip(gradients(found, wanted), gradients(value, wanted), strict=True):
        close(a, b, 0.0)


@each_kind
def test_a_relation_takes_features_that_were_made_under_inference_mode(kind):
    block, features = NonLocalRelation(4, kind=kind, residual=True).double(), normal(2, 4, 3, 5)
    with torch.inference_mode():
        frozen = features.clone()
    close(block(frozen), block(features), 0.0)
    found, expected = (gradients(block(x), trained(block)) for x in (frozen, features))
    for a, b in zip(found, expected, strict=True):
        close(a, b, 0.0)


@each_case
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_at_least_float32_whatever_comes_in(case, student_dtype, teacher_dtype):
    student, teacher = case.features()
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    expected = case.module()(student.double(), teacher.double())
    for module in (case.module().float(), case.module()):
        value = module(student.requires_grad_(), teacher)
        assert value.dtype == next(module.parameters()).dtype
        close(value, expected, 1e-4)
        (gradient,) = gradients(value, [student])
        assert gradient.dtype == student_dtype
        assert gradient.isfinite().all()


@each_case
def test_half_precision_parameters_compute_in_float32(case):
    module, (student, teacher) = case.module().bfloat16(), case.features(dtype=torch.bfloat16)
    value = module(student, teacher)
    assert value.dtype == torch.float32
    close(value, copy.deepcopy(module).double()(student.double(), teacher.double()), 1e-4)


@each_case
def test_autocast_changes_nothing(case):
    module, (student, teacher) = case.module().float(), case.features(dtype=torch.float32)
    expected = module(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        value = module(student, teacher)
    assert value.dtype == torch.float32
    close(value, expected, 0.0)


@each_case
def test_an_empty_batch_gives_a_differentiable_zero(case):
    module, (student, teacher) = case.module(), leaves(case.features(batch=0))
    value = module(student, teacher)
    assert (value == 0).all()
    value.sum().backward()
    assert student.grad.shape == student.shape
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


@each_case
def test_maps_of_one_position(case):
    module, (student, teacher) = case.module(), leaves(case.features(positions=(1, 1)))
    value = module(student, teacher)
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(value, [student, *trained(module)]))


@each_case
def test_layout_does_not_matter(case):
    module, (student, teacher) = case.module(), case.features()
    expected = module(student, teacher)
    last = torch.channels_last
    close(module(student.contiguous(memory_format=last), teacher), expected, 1e-13)
    close(module(student, teacher.mT.contiguous().mT), expected, 1e-13)
    wide = [F.pad(features, (1, 2, 2, 1), value=5.0) for features in (student, teacher)]
    close(module(*(features[..., 2:-1, 1:-2] for features in wide)), expected, 1e-13)


@each_case
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_and_inf_are_never_hidden(case, bad, side):
    features = case.features()
    features[side][0, 1, 2, 3] = bad
    value = case.module()(*features)
    assert not value.reshape(-1)[0].isfinite()


@pytest.mark.parametrize("case", APART, ids=str)
@torch_loops
def test_per_sample_gradients(case):
    module, (student, teacher) = case.module(), case.features(batch=3)

    def loss(s, t):
        return module(s[None], t[None]).sum()

    actual = torch.func.vmap(torch.func.grad(loss))(student, teacher)
    for b in range(3):
        image = student[b : b + 1].clone().requires_grad_()
        close(actual[b], gradients(module(image, teacher[b : b + 1]), [image])[0][0])


# --- forward mode: constants for backward are constants there too ---------------------------------


def preset(name):
    # `eval`: torch.func takes no batch normalisation that keeps statistics of what it is given.
    loss = FeatureDistillationLoss(4, 3, hyperparameters=getattr(featkd, name)).double().eval()
    randomize(loss)
    return SumOfTerms(loss)


PRESETS = ["TWO_STAGE", "ONE_STAGE", "NORMALIZED", "FPN_OUTPUTS"]
PRESETS += ["RELEASED_TWO_STAGE", "RELEASED_ONE_STAGE"]
DIFFERENTIABLE = {
    **{case.name: (case.module, case.teacher_channels) for case in APART},
    **{name: (partial(preset, name), 3) for name in PRESETS},
}
each_differentiable = pytest.mark.parametrize(
    ("build", "channels"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE
)


def total(loss, parameters, student, teacher):
    return torch.func.functional_call(loss, parameters, (student, teacher)).sum()


@each_differentiable
@torch_scripts
def test_forward_mode_is_the_gradient_along_a_direction(build, channels):
    """Of student, teacher and all parameters at once, those that are frozen included."""
    loss = build().requires_grad_()
    names = [name for name, _ in loss.named_parameters()]
    points = [normal(2, 4, 4, 6, seed=1), normal(2, channels, 4, 6, seed=2), *loss.parameters()]
    points = leaves(points)
    directions = [normal(*x.shape, seed=10 + index) for index, x in enumerate(points)]

    def value(student, teacher, *parameters):
        return total(loss, dict(zip(names, parameters, strict=True)), student, teacher)

    slopes = gradients(value(*points), points)
    expected = sum((a * b).sum() for a, b in zip(slopes, directions, strict=True))
    point = tuple(x.detach() for x in points)
    close(torch.func.jvp(value, point, tuple(directions))[1], expected)


@each_differentiable
@torch_scripts
@torch_loops
def test_the_hessian_is_symmetric_and_that_of_double_backward(build, channels):
    loss, teacher = build(), normal(1, channels, 2, 3, seed=2)
    student = normal(1, 4, 2, 3, seed=1)
    found = torch.func.hessian(lambda x: loss(x, teacher).sum())(student).reshape(24, 24)
    close(found, found.mT)
    twice = torch.autograd.functional.hessian(lambda x: loss(x, teacher).sum(), student)
    close(found, twice.reshape(24, 24))


@torch_loops
@pytest.mark.parametrize("name", PRESETS)
def test_per_sample_gradients_of_a_preset(name):
    loss, student, teacher = preset(name), normal(3, 4, 4, 6, seed=1), normal(3, 3, 4, 6, seed=2)
    actual = torch.func.vmap(torch.func.grad(lambda s, t: loss(s[None], t[None])))(student, teacher)
    for b in range(3):
        image = student[b : b + 1].clone().requires_grad_()
        close(actual[b], gradients(loss(image, teacher[b : b + 1]), [image])[0][0])


@torch_scripts
def test_forward_mode_through_a_batch_normalisation_in_training():
    case = next(case for case in MODULE_CASES if not case.images_apart)
    loss, (student, teacher) = case.module(), case.features()
    direction = normal(*student.shape, seed=9)
    with forward_ad.dual_level():
        value = loss(forward_ad.make_dual(student, direction), teacher)
        along = forward_ad.unpack_dual(value).tangent
    (slope,) = gradients(loss(student.requires_grad_(), teacher), [student])
    close(along, (slope * direction).sum())


# --- other sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(2, 3), (7, 5), (4, 6)])
@pytest.mark.parametrize(
    "build",
    [
        lambda **o: AttentionTransferLoss(4, 3, **o),
        lambda **o: AttentionMaskedLoss(4, 3, temperature=0.5, **o),
        lambda **o: NonLocalLoss(4, 3, kind="dot_product", **o),
        lambda **o: FeatureDistillationLoss(4, 3, hyperparameters=ALL_TERMS, **o),
    ],
    ids=["transfer", "masked", "non_local", "total"],
)
def test_resize_brings_the_student_to_the_teacher(build, size, mode):
    def values(loss, *features):
        value = loss(*features)
        return list(value.values()) if isinstance(value, dict) else [value]

    student, teacher = normal(2, 4, *size, seed=1), normal(2, 3, 4, 6, seed=2)
    resizing, plain = build(resize=mode).double(), build().double()
    plain.load_state_dict(resizing.state_dict())
    align = {"align_corners": False} if mode == "bilinear" else {}
    resized = F.interpolate(student, (4, 6), mode=mode, **align)
    for a, b in zip(
        values(resizing, student, teacher), values(plain, resized, teacher), strict=True
    ):
        close(a, b)
    for value in values(resizing, student.bfloat16(), teacher):
        assert value.dtype == torch.float64


# --- subsampled keys ------------------------------------------------------------------------------


@each_kind
def test_keys_may_be_pooled_by_more_than_the_map_has(kind):
    """The smallest level of a pyramid may be smaller than the released code's factor."""
    for size in ((1, 1), (1, 3), (3, 5)):
        block = NonLocalRelation(4, kind=kind, subsample=8)
        assert block(normal(2, 4, *size, dtype=torch.float32)).shape == (2, 2, *size)


@each_kind
def test_a_constant_map_has_the_same_relation_with_fewer_keys(kind):
    full, few = (NonLocalRelation(4, kind=kind, subsample=s).double() for s in (1, 2))
    few.load_state_dict(full.state_dict())
    features = normal(2, 4, 1, 1).expand(-1, -1, 4, 6)
    close(few(features), full(features))


# --- the teacher's relation -----------------------------------------------------------------------


def train(loss, student, teacher, steps=60, optimizer=torch.optim.Adam, **options):
    optimizer = optimizer(trained(loss), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()


def mismatched():
    """Features that no layer on the student's side can turn into the teacher's."""
    return normal(4, 4, 4, 6, seed=1).float(), normal(4, 6, 4, 6, seed=2).float()


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.Adam, {"lr": 0.05}),
        (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.5}),
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    ],
)
@each_kind
def test_a_fixed_teacher_relation_does_not_collapse(kind, optimizer, options):
    student, teacher = mismatched()
    loss = NonLocalLoss(4, 6, kind=kind)
    before = loss.teacher_relation(teacher)
    assert before.norm() > 0.1
    # Even if everything the module calls a parameter is given to the optimizer.
    loss.requires_grad_(False)
    for side in (loss.student_relation, loss.adapter):
        side.requires_grad_(True)
    train(loss, student, teacher, optimizer=optimizer, **options)
    close(loss.teacher_relation(teacher), before, 0.0)
    assert loss(student, teacher) > 0.1 * before.flatten(1).norm(dim=1).mean()


def test_parameters_of_a_fixed_teacher_relation_need_no_gradient():
    fixed, free = (
        NonLocalLoss(4, 6, kind="dot_product", teacher_relation=mode)
        for mode in ("fixed", "trained")
    )
    assert not any(p.requires_grad for p in fixed.teacher_relation.parameters())
    assert all(p.requires_grad for p in free.parameters())
    assert set(fixed.state_dict()) == set(free.state_dict())


def test_a_fixed_teacher_relation_stays_fixed_if_someone_unfreezes_it():
    student, teacher = mismatched()
    loss = NonLocalLoss(4, 6, kind="dot_product").requires_grad_(True)
    before = loss.teacher_relation(teacher).detach()
    train(loss, student, teacher, lr=0.05)
    close(loss.teacher_relation(teacher), before, 0.0)


def test_a_trained_teacher_relation_collapses_without_residual():
    student, teacher = mismatched()
    loss = NonLocalLoss(4, 6, kind="dot_product", teacher_relation="trained")
    before = loss.teacher_relation(teacher).norm()
    train(loss, student, teacher, lr=0.05)
    assert loss.teacher_relation(teacher).norm() < 0.1 * before


def test_a_residual_keeps_a_trained_teacher_relation_up():
    student, teacher = mismatched()
    loss = NonLocalLoss(4, 6, kind="dot_product", teacher_relation="trained", residual=True)
    train(loss, student, teacher, lr=0.05)
    assert loss.teacher_relation(teacher).norm() > 0.3 * teacher.norm()


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_a_resized_student_of_half_precision_is_not_rounded_again(mode):
    loss = AttentionMaskedLoss(4, 4, temperature=0.5, resize=mode)
    student, teacher = normal(2, 4, 3, 5, seed=1).half(), normal(2, 4, 4, 6, seed=2).half()
    close(loss(student, teacher), loss(student.float(), teacher.float()), 0.0)


# --- normalisation --------------------------------------------------------------------------------

NORMALIZED = {
    "transfer": lambda **o: AttentionTransferLoss(4, 3, normalize=True, **o),
    "masked": lambda **o: AttentionMaskedLoss(4, 3, temperature=0.5, normalize=True, **o),
    "non_local": lambda **o: NonLocalLoss(4, 3, kind="dot_product", normalize=True, **o),
}


@pytest.mark.parametrize("build", NORMALIZED.values(), ids=NORMALIZED)
def test_a_teacher_of_zeros_is_left_undivided(build):
    """Its relation is not zero but a constant if g has a bias; then the division is finite too."""
    loss = build(reduction="none").double()
    for parameter in loss.parameters():
        if parameter.ndim == 1:
            parameter.detach().zero_()
    student, teacher = normal(2, 4, 3, 5), torch.zeros(2, 3, 3, 5, dtype=torch.float64)
    plain = copy.deepcopy(loss)
    plain.normalize = False
    close(loss(student, teacher), plain(student, teacher))


@pytest.mark.parametrize("build", NORMALIZED.values(), ids=NORMALIZED)
def test_a_normalized_loss_treats_each_image_alone(build):
    loss = build(reduction="none").double()
    student, teacher = normal(3, 4, 3, 5, seed=1), normal(3, 3, 3, 5, seed=2)
    teacher = teacher * torch.tensor([1e-3, 1.0, 1e3]).double().reshape(3, 1, 1, 1)
    alone = [loss(student[b : b + 1], teacher[b : b + 1]) for b in range(3)]
    close(loss(student, teacher), torch.cat(alone))


@pytest.mark.parametrize("attention", MAPS)
def test_a_normalized_loss_of_a_student_of_zeros_is_1(attention):
    loss = AttentionTransferLoss(3, 3, attention=attention, normalize=True, reduction="none")
    teacher = normal(2, 3, 4, 5, dtype=torch.float32)
    close(loss(torch.zeros_like(teacher), teacher), torch.ones(2), 1e-6)


def test_a_normalized_relation_of_equal_features_times_k():
    """Without biases the dot product is cubic on both sides, so the ratio stays."""
    loss = NonLocalLoss(4, 4, kind="dot_product", normalize=True).double()
    for parameter in loss.parameters():
        if parameter.ndim == 1:
            parameter.detach().zero_()
    student, teacher = normal(2, 4, 3, 5, seed=1), normal(2, 4, 3, 5, seed=2)
    close(loss(7 * student, 7 * teacher), loss(student, teacher))


# --- hyper-parameters -----------------------------------------------------------------------------

RELEASED = {
    "fusion": "probabilities",
    "absolute": False,
    "reduction": "norm",
    "residual": True,
    "batch_norm": True,
    "teacher_relation": "trained",
    "kind": "dot_product",
    "transfer_attention": "both",
    "normalize": False,
}
PRINTED = {
    "fusion": "logits",
    "absolute": True,
    "reduction": "mean",
    "residual": False,
    "batch_norm": False,
    "teacher_relation": "fixed",
    "transfer_attention": "both",
    "masked_attention": "both",
    "normalize": False,
}


@pytest.mark.parametrize(
    ("name", "weights", "temperature", "settings"),
    [
        ("TWO_STAGE", (7e-5, 4e-3, 7e-5), 0.1, PRINTED),
        ("ONE_STAGE", (4e-4, 2e-2, 4e-4), 0.5, PRINTED),
        ("FPN_OUTPUTS", (4e-4, 2e-2, 4e-4), 4.0, PRINTED),
        ("RELEASED_TWO_STAGE", (4e-3, 7e-5, 7e-5), 0.5, RELEASED | {"masked_attention": "spatial"}),
        (
            "RELEASED_ONE_STAGE",
            (4e-3 * 6, 7e-5 * 6, 7e-5 * 6),
            0.1,
            RELEASED | {"masked_attention": "both"},
        ),
    ],
)
def test_presets(name, weights, temperature, settings):
    preset = getattr(featkd, name)
    assert (preset.alpha, preset.beta, preset.gamma) == pytest.approx(weights, rel=1e-12)
    assert preset.temperature == temperature
    assert {key: getattr(preset, key) for key in settings} == settings


def test_hyperparameters_are_frozen_and_can_be_replaced():
    with pytest.raises(dataclasses.FrozenInstanceError):
        featkd.TWO_STAGE.alpha = 1.0
    changed = dataclasses.replace(featkd.TWO_STAGE, temperature=0.5)
    assert (changed.temperature, changed.alpha) == (0.5, featkd.TWO_STAGE.alpha)
    assert featkd.TWO_STAGE.temperature == 0.1
    assert pickle.loads(pickle.dumps(changed)) == changed


# --- the overall loss -----------------------------------------------------------------------------

KEYS = ["loss_attention_transfer", "loss_attention_masked", "loss_non_local"]
STUDENT_CHANNELS, TEACHER_CHANNELS = {"c3": 4, "c4": 6}, {"c3": 4, "c4": 3}


def levels():
    student = {"c3": normal(2, 4, 4, 6, seed=1), "c4": normal(2, 6, 2, 3, seed=2)}
    teacher = {"c3": normal(2, 4, 4, 6, seed=3), "c4": normal(2, 3, 2, 3, seed=4)}
    return student, teacher


def by_level(**options):
    options = {"hyperparameters": ALL_TERMS} | options
    loss = FeatureDistillationLoss(STUDENT_CHANNELS, TEACHER_CHANNELS, **options).double()
    randomize(loss)
    return loss


def test_without_a_reduction_each_term_has_one_value_an_image():
    settings = dataclasses.replace(ALL_TERMS, reduction="none")
    loss, (student, teacher) = by_level(hyperparameters=settings), levels()
    together = loss(student, teacher)
    for b in range(2):
        image = ({level: x[b : b + 1] for level, x in side.items()} for side in (student, teacher))
        for name, value in loss(*image).items():
            close(together[name][b : b + 1], value)


def test_the_terms_are_weighted_and_summed_over_the_levels():
    loss, (student, teacher) = by_level(), levels()
    terms = loss(student, teacher)
    assert sorted(terms) == sorted(KEYS)
    for name, weight in zip(KEYS, (0.5, 2.0, 3.0), strict=True):
        modules = getattr(loss, name.removeprefix("loss_"))
        assert sorted(modules) == ["c3", "c4"]
        expected = weight * sum(modules[level](student[level], teacher[level]) for level in modules)
        close(terms[name], expected)
        assert terms[name].shape == ()


def test_shapes_are_worked_out_on_the_meta_device():
    loss = FeatureDistillationLoss(4, 3, hyperparameters=ALL_TERMS).to("meta")
    ours, theirs = torch.empty(2, 4, 5, 6, device="meta"), torch.empty(2, 3, 5, 6, device="meta")
    assert all(value.shape == () for value in loss(ours, theirs).values())


@pytest.mark.parametrize("absolute", [True, False])
def test_the_terms_have_the_gradients_of_the_losses_on_their_own(absolute):
    """Attention transfer and masks share one reading of the features."""
    settings = dataclasses.replace(ALL_TERMS, absolute=absolute)
    loss, (student, teacher) = by_level(hyperparameters=settings), levels()
    student = {level: value.requires_grad_() for level, value in student.items()}
    for name, weight in zip(KEYS, (0.5, 2.0, 3.0), strict=True):
        modules = getattr(loss, name.removeprefix("loss_"))
        alone = weight * sum(modules[level](student[level], teacher[level]) for level in modules)
        inputs = [*student.values(), *modules.parameters()]
        inputs = [value for value in inputs if value.requires_grad]
        expected = torch.autograd.grad(alone, inputs)
        found = torch.autograd.grad(loss(student, teacher)[name], inputs)
        for a, b in zip(found, expected, strict=True):
            close(a, b)


def test_one_level_by_tensors_equals_one_level_by_name():
    student, teacher = normal(2, 4, 4, 6, seed=1), normal(2, 3, 4, 6, seed=2)
    single = FeatureDistillationLoss(4, 3, hyperparameters=ALL_TERMS).double()
    named = FeatureDistillationLoss({"p": 4}, {"p": 3}, hyperparameters=ALL_TERMS).double()
    named.load_state_dict({k.replace("features", "p"): v for k, v in single.state_dict().items()})
    for name, value in named({"p": student}, {"p": teacher}).items():
        close(value, single(student, teacher)[name], 0.0)


def test_the_order_of_the_levels_does_not_matter():
    loss, (student, teacher) = by_level(), levels()
    backwards = dict(reversed(student.items()))
    for name, value in loss(backwards, teacher).items():
        close(value, loss(student, teacher)[name], 0.0)


def test_the_losses_join_a_detector_s():
    detector_losses = {"classification": torch.tensor(1.0), "bbox_regression": torch.tensor(2.0)}
    distillation_losses = by_level()(*levels())
    total = sum((detector_losses | distillation_losses).values())
    total.backward()
    close(total, 3.0 + sum(distillation_losses.values()))


@pytest.mark.parametrize("index", range(3))
def test_a_weight_of_0_builds_nothing_and_does_nothing(index):
    weights = [1.0, 1.0, 1.0]
    weights[index] = 0
    loss = by_level(hyperparameters=Hyperparameters(*weights, 0.5))
    name = KEYS[index]
    part = name.removeprefix("loss_")
    assert not [key for key in loss.state_dict() if key.startswith(part)]
    assert not list(getattr(loss, part).parameters())
    student, teacher = levels()
    terms = loss(student, teacher)
    assert sorted(terms) == sorted(KEYS)
    close(terms[name], 0.0, 0.0)
    assert not terms[name].requires_grad
    kept = [value for key, value in terms.items() if key != name]
    assert all(value.requires_grad and value > 0 for value in kept)
    sum(terms.values()).backward()


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        (torch.bfloat16, "cpu", torch.float32),
        (torch.float64, "cpu", torch.float64),
        (torch.float32, "meta", torch.float32),
    ],
)
def test_a_term_of_weight_0_has_the_dtype_and_the_device_of_the_others(dtype, device, expected):
    settings = dataclasses.replace(ALL_TERMS, gamma=0)
    loss = FeatureDistillationLoss(4, 4, hyperparameters=settings).to(device, expected)
    features = torch.ones(2, 4, 3, 5, dtype=dtype, device=device)
    terms = loss(features, features).values()
    assert {(term.dtype, term.device.type) for term in terms} == {(expected, device)}


def test_all_weights_0():
    loss = by_level(hyperparameters=Hyperparameters(0, 0, 0, 0.5))
    assert list(loss.parameters()) == []
    assert {name: value.item() for name, value in loss(*levels()).items()} == dict.fromkeys(KEYS, 0)


def test_hyperparameters_reach_every_term():
    settings = Hyperparameters(
        1.0,
        1.0,
        1.0,
        0.7,
        fusion="probabilities",
        absolute=False,
        reduction="sum",
        transfer_attention="spatial",
        masked_attention="channel",
        kind="concatenation",
        residual=True,
        batch_norm=True,
        teacher_relation="trained",
        normalize=True,
    )
    loss, (student, teacher) = by_level(hyperparameters=settings), levels()
    alone = {
        "attention_transfer": AttentionTransferLoss(
            6, 3, attention="spatial", absolute=False, reduction="sum", normalize=True
        ),
        "attention_masked": AttentionMaskedLoss(
            6,
            3,
            temperature=0.7,
            fusion="probabilities",
            attention="channel",
            reduction="sum",
            normalize=True,
        ),
        "non_local": NonLocalLoss(
            6,
            3,
            kind="concatenation",
            residual=True,
            batch_norm=True,
            teacher_relation="trained",
            reduction="sum",
            normalize=True,
        ),
    }
    for name, module in alone.items():
        inside = getattr(loss, name)["c4"]
        module.double().load_state_dict(inside.state_dict())
        close(inside(student["c4"], teacher["c4"]), module(student["c4"], teacher["c4"]), 0.0)
        required = [p.requires_grad for p in inside.parameters()]
        assert required == [p.requires_grad for p in module.parameters()]


def test_the_default_is_the_recommended_preset():
    loss = FeatureDistillationLoss(6, 3).double()
    assert loss.hyperparameters == featkd.STANDARDIZED
    assert FeatureDistillationLoss(6, 3, featkd.ONE_STAGE).hyperparameters == featkd.ONE_STAGE
    student, teacher = normal(2, 6, 4, 5), normal(2, 3, 4, 5, seed=1)
    adapted = loss.attention_masked["features"].adapter(student)
    expected = 4 * featkd.attention_masked_loss(adapted, teacher, standardize=True)
    terms = loss(student, teacher)
    close(terms["loss_attention_masked"], expected)
    assert sum(terms.values()) == terms["loss_attention_masked"]


def test_every_term_is_standardised_and_the_masks_by_their_maps_deviation():
    settings = Hyperparameters(1.0, 1.0, 1.0, 2.0, standardize=True)
    loss, (student, teacher) = by_level(hyperparameters=settings), levels()
    terms = loss(student, teacher)
    scaled = loss(*({k: 100 * v for k, v in maps.items()} for maps in (student, teacher)))
    for name, value in terms.items():
        close(scaled[name], value)


@pytest.mark.parametrize("argument", [True, False])
def test_the_argument_normalize_wins_over_the_hyperparameters(argument):
    settings = dataclasses.replace(ALL_TERMS, normalize=not argument)
    wanted = by_level(hyperparameters=dataclasses.replace(ALL_TERMS, normalize=argument))
    loss = by_level(hyperparameters=settings, normalize=argument)
    for name, value in loss(*levels()).items():
        close(value, wanted(*levels())[name], 0.0)


def test_normalized_terms_start_near_1_for_a_student_of_zeros():
    channels = {"c3": 4, "c4": 6}
    settings = Hyperparameters(1.0, 1.0, 0.0, 0.5, normalize=True)
    loss = FeatureDistillationLoss(channels, channels, hyperparameters=settings)
    teacher = {"c3": 1e3 * torch.randn(2, 4, 4, 6), "c4": 1e-3 * torch.randn(2, 6, 2, 3)}
    terms = loss({name: torch.zeros_like(value) for name, value in teacher.items()}, teacher)
    close(terms["loss_attention_transfer"], 2.0, 1e-5)  # 1 a level
    close(terms["loss_attention_masked"], 2.0, 1e-5)


def test_options_by_level():
    loss = by_level(inter_channels={"c3": 5, "c4": 1}, subsample={"c3": 2, "c4": 1})
    assert loss.non_local["c3"].student_relation.inter_channels == 5
    assert loss.non_local["c4"].student_relation.inter_channels == 1
    assert loss.non_local["c3"].teacher_relation.subsample == 2
    assert loss.non_local["c4"].teacher_relation.subsample == 1
    assert all(value.isfinite() for value in loss(*levels()).values())


def test_a_dot_in_a_level_s_name_is_a_slash_in_the_parameters_names():
    loss = FeatureDistillationLoss({"a.b": 4}, {"a.b": 4}, hyperparameters=featkd.NORMALIZED)
    parameters = {"adapter.weight", "adapter.bias"}
    assert set(loss.state_dict()) == {f"attention_masked.a/b.{name}" for name in parameters}


def test_levels_may_be_named_like_paths():
    channels = {"backbone.body.layer2": 4, "backbone.body.layer3": 4}
    loss = FeatureDistillationLoss(channels, channels, hyperparameters=ALL_TERMS)
    maps = {level: torch.randn(1, 4, 2, 3) for level in channels}
    close(sum(loss(maps, maps).values()), 0.0, 0.0)
    assert len(list(loss.parameters())) == 2 * len(
        list(FeatureDistillationLoss(4, 4, hyperparameters=ALL_TERMS).parameters())
    )


def test_a_training_loop_lowers_the_loss():
    loss, (student, teacher) = by_level(), levels()
    backbone = nn.ModuleDict(
        {"c3": nn.Conv2d(4, 4, 3, padding=1), "c4": nn.Conv2d(6, 6, 3, padding=1)}
    ).double()

    def value():
        return sum(loss({k: backbone[k](v) for k, v in student.items()}, teacher).values())

    optimizer = torch.optim.Adam([*backbone.parameters(), *trained(loss)], lr=0.01)
    before = value().item()
    for _ in range(50):
        optimizer.zero_grad()
        value().backward()
        optimizer.step()
    assert value().item() < 0.5 * before
