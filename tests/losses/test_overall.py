"""FeatureDistillationLoss: the weighted sum over terms and levels."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import featkd
from featkd import (
    AttentionMaskedLoss,
    AttentionTransferLoss,
    FeatureDistillationLoss,
    Hyperparameters,
    NonLocalLoss,
)
from tests.helpers.cases import KINDS
from tests.helpers.module_cases import ALL_TERMS, randomize
from tests.helpers.strategies import generic_pairs
from tests.helpers.tensors import close, normal, tensor, trained

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


def test_golden_total():
    # Adapters start as the identity. S = 0; T is (-3, 4) at c3, (6, 8) at c4, and masks are even.
    teacher = {"c3": tensor([[[[-3, 4]]]]), "c4": tensor([[[[6, 8]]]])}
    student = {level: torch.zeros_like(x) for level, x in teacher.items()}
    settings = Hyperparameters(2, 3, 0, None)
    loss = FeatureDistillationLoss(dict.fromkeys(teacher, 1), dict.fromkeys(teacher, 1), settings)
    terms = loss.double()(student, teacher)
    # G_s has the norms 5 and 10, G_c is 3.5 and 7.
    close(terms["loss_attention_transfer"], 2 * (5 + 3.5 + 10 + 7))
    close(terms["loss_attention_masked"], 3 * (5 + 10))
    close(terms["loss_non_local"], 0.0)


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


def test_weights_above_0_may_change_in_the_middle_of_a_training_and_nothing_else():
    loss = FeatureDistillationLoss(4, 3, featkd.FPN_OUTPUTS).double()
    features = normal(2, 4, 4, 5), normal(2, 3, 4, 5, seed=1)
    before = loss(*features)
    loss.hyperparameters = dataclasses.replace(loss.hyperparameters, alpha=4e-3, beta=1e-2)
    factors = {"loss_attention_transfer": 10, "loss_attention_masked": 0.5, "loss_non_local": 1}
    after = loss(*features)
    for name, factor in factors.items():
        close(after[name], factor * before[name])
    for name, value in {"temperature": 0.5, "gamma": 0, "standardize": True}.items():
        kept = loss.hyperparameters
        other = dataclasses.replace(kept, **{name: value})
        with pytest.raises(ValueError, match=f"weights above 0 alone, got {name}={value}"):
            loss.hyperparameters = other
        assert loss.hyperparameters is kept
    alone = FeatureDistillationLoss(4, 3)
    with pytest.raises(ValueError, match=r"got alpha=1\.0 in place of 0\.0: build another loss"):
        alone.hyperparameters = dataclasses.replace(featkd.STANDARDIZED, alpha=1.0)
    with pytest.raises(TypeError, match=r"`hyperparameters` must be a Hyperparameters.*got float"):
        alone.hyperparameters = 8.0


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
    loss = FeatureDistillationLoss({"a.b": 4}, {"a.b": 4}, hyperparameters=featkd.STANDARDIZED)
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


@pytest.mark.parametrize(
    ("absolute", "teacher_channels", "readings"),
    [(True, 4, 2), (True, 3, 3), (False, 4, 4)],  # 3: M_c is of the adapted student
)
def test_transfer_and_masks_share_one_reading_of_each_side(
    absolute, teacher_channels, readings, monkeypatch
):
    read = []
    for module in (featkd.losses.overall, featkd.losses.masked, featkd.losses.transfer):

        def counted(features, *options, maps=module.maps_over):
            read.append(features)
            return maps(features, *options)

        monkeypatch.setattr(module, "maps_over", counted)
    settings = dataclasses.replace(ALL_TERMS, absolute=absolute)
    loss = FeatureDistillationLoss(4, teacher_channels, hyperparameters=settings)
    loss(torch.ones(2, 4, 3, 5), torch.ones(2, teacher_channels, 3, 5))
    assert len(read) == readings


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


@given(generic_pairs(), st.sampled_from(KINDS))
def test_a_gradient_step_on_student_and_adapters_lowers_the_total(pair, kind):
    channels = pair[0].shape[1]
    hyperparameters = featkd.Hyperparameters(1.0, 1.0, 1.0, 1e6, kind=kind)
    loss = featkd.FeatureDistillationLoss(
        channels, channels, hyperparameters=hyperparameters
    ).double()
    student = pair[0].clone().requires_grad_()
    trained = [student, *(p for p in loss.parameters() if p.requires_grad)]
    before = sum(loss(student, pair[1]).values())
    gradients = torch.autograd.grad(before, trained)
    slope = sum(gradient.square().sum() for gradient in gradients)
    with torch.no_grad():
        for value, gradient in zip(trained, gradients, strict=True):
            value -= 1e-6 * before / slope * gradient
    assert sum(loss(student, pair[1]).values()) < before
