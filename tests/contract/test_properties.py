"""What the mathematics promises for any input, each found by hypothesis in float64 with H != W.

What any distance of feature maps promises comes from `featkd.testing`; the rest is this paper's.
"""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import featkd
from featkd import (
    attention_mask,
    attention_masked_loss,
    attention_transfer_loss,
    channel_attention,
    concatenation_relation,
    dot_product_relation,
    embedded_gaussian_relation,
    gaussian_relation,
    non_local_loss,
    spatial_attention,
    testing,
)
from tests.helpers import reference
from tests.helpers.cases import FUSIONS, KINDS, REDUCTIONS, close, normal

# --- strategies and helpers -----------------------------------------------------------------------

counts = st.integers(1, 4)
seeds = st.integers(0, 2**32)
magnitudes = st.sampled_from([1e-3, 1.0, 30.0])
sizes = st.tuples(st.integers(1, 5), st.integers(1, 5)).filter(lambda size: size[0] != size[1])
factors = st.floats(0.01, 100)
temperatures = st.floats(0.1, 10)
fusions = st.sampled_from(FUSIONS)
reductions = st.sampled_from(REDUCTIONS)
positions = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


pairs = testing.feature_pairs(magnitudes=[1e-3, 1.0, 30.0])


@st.composite
def generic_pairs(draw):
    """Features of student and teacher without zeros and ties."""
    shape = (draw(counts), draw(counts), *draw(sizes))
    seed, magnitude = draw(seeds), draw(magnitudes)
    return magnitude * normal(*shape, seed=seed), magnitude * normal(*shape, seed=seed + 1)


@st.composite
def relation_arguments(draw, kind, query_positions=None, key_positions=None):
    """The arguments of a relation; theta has positions of its own where the kind allows it."""
    batch, channels, values, seed = draw(counts), draw(counts), draw(counts), draw(seeds)
    query_positions = query_positions or draw(sizes)
    key_positions = key_positions or query_positions
    g = normal(batch, values, *key_positions, seed=seed)
    if kind == "gaussian":
        return normal(batch, channels, *key_positions, seed=seed + 1), g
    channels = 1 if kind == "concatenation" else channels
    theta = normal(batch, channels, *query_positions, seed=seed + 1)
    return theta, normal(batch, channels, *key_positions, seed=seed + 2), g


RELATION = {
    "gaussian": gaussian_relation,
    "embedded_gaussian": embedded_gaussian_relation,
    "dot_product": dot_product_relation,
    "concatenation": concatenation_relation,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def maps_of(student: Tensor, teacher: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The two attention maps of both."""
    return {
        "spatial": (spatial_attention(student), spatial_attention(teacher)),
        "channel": (channel_attention(student), channel_attention(teacher)),
    }


def masks_of(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    return {
        f"{name}_mask": attention_mask(*maps, temperature=temperature)
        for name, maps in maps_of(student, teacher).items()
    }


def masked(student, teacher, **options):
    """L_AM under the paper's masks, which are constants."""
    with torch.no_grad():
        masks = masks_of(student, teacher)
    return attention_masked_loss(student, teacher, **masks, **options)


def masked_as(student, teacher, **options):
    """L_AM with the masks of this pair, whatever features it is called with."""
    return functools.partial(attention_masked_loss, **masks_of(student, teacher), **options)


LOSSES = [attention_transfer_loss, masked, non_local_loss]
each_loss = pytest.mark.parametrize("loss", LOSSES)

MODULES = {
    "transfer": featkd.AttentionTransferLoss,
    "masked": functools.partial(featkd.AttentionMaskedLoss, temperature=0.5),
    "non_local": functools.partial(featkd.NonLocalLoss, kind="embedded_gaussian"),
}

SYMMETRIES = {
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll((1, 2), (-2, -1)),
    "transpose": lambda x: x.transpose(-1, -2),
}
each_symmetry = pytest.mark.parametrize("move", SYMMETRIES.values(), ids=SYMMETRIES)


def permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# --- masks ----------------------------------------------------------------------------------------


@given(pairs, temperatures, fusions)
def test_a_mask_has_mean_1_over_each_image(pair, temperature, fusion):
    for maps in maps_of(*pair).values():
        mask = attention_mask(*maps, temperature=temperature, fusion=fusion)
        assert mask.shape == maps[0].shape
        assert (mask >= 0).all()
        close(mask.flatten(1).mean(1), torch.ones(len(mask)))


@given(pairs, temperatures, factors, fusions)
def test_a_mask_is_unchanged_if_maps_and_temperature_scale_alike(pair, temperature, k, fusion):
    for maps in maps_of(*pair).values():
        mask = attention_mask(*maps, temperature=temperature, fusion=fusion)
        scaled = attention_mask(
            k * maps[0], k * maps[1], temperature=k * temperature, fusion=fusion
        )
        close(scaled, mask)


@given(pairs, fusions)
def test_a_mask_of_infinite_temperature_is_ones(pair, fusion):
    for maps in maps_of(*pair).values():
        mask = attention_mask(*maps, temperature=1e12, fusion=fusion)
        close(mask, torch.ones_like(mask), 1e-9)


@given(generic_pairs(), fusions)
def test_a_mask_of_temperature_near_0_is_all_on_the_largest_element(pair, fusion):
    for attention, _ in maps_of(*pair).values():
        mask = attention_mask(attention, attention, temperature=1e-12, fusion=fusion).flatten(1)
        largest = attention.flatten(1).argmax(1, keepdim=True)
        close(mask, torch.zeros_like(mask).scatter(1, largest, float(mask.shape[1])), 1e-6)


@given(pairs, temperatures, fusions)
def test_a_mask_grows_with_the_attention(pair, temperature, fusion):
    for attention, _ in maps_of(*pair).values():
        mask = attention_mask(attention, attention, temperature=temperature, fusion=fusion)
        order = attention.flatten(1).argsort(1)
        assert (mask.flatten(1).gather(1, order).diff(dim=1) >= 0).all()


@given(pairs, st.floats(-100, 100), fusions)
def test_a_mask_is_unchanged_if_a_constant_is_added_to_a_map(pair, constant, fusion):
    for student, teacher in maps_of(*pair).values():
        mask = attention_mask(student, teacher, temperature=0.5, fusion=fusion)
        close(attention_mask(student + constant, teacher, temperature=0.5, fusion=fusion), mask)


# --- symmetries -----------------------------------------------------------------------------------


@given(pairs, seeds)
def test_permuting_the_channels(pair, seed):
    student, teacher = pair
    order = permutation(student.shape[1], seed)
    permuted = student[:, order], teacher[:, order]
    close(spatial_attention(permuted[0]), spatial_attention(student))
    close(channel_attention(permuted[0]), channel_attention(student)[:, order])
    for loss in LOSSES:
        close(loss(*permuted), loss(student, teacher))
        testing.assert_channel_permutation_invariant(loss, student, teacher)


@each_kind
@given(st.data())
def test_permuting_the_channels_of_a_relation(kind, data):
    *embedded, g = data.draw(relation_arguments(kind))
    channels, values = permutation(embedded[0].shape[1], 1), permutation(g.shape[1], 2)
    permuted = RELATION[kind](*(x[:, channels] for x in embedded), g[:, values])
    close(permuted, RELATION[kind](*embedded, g)[:, values])


@given(pairs)
def test_moving_the_positions_moves_the_maps_and_leaves_the_losses(pair):
    results = [
        lambda s, t: spatial_attention(s) - 2 * spatial_attention(t),
        lambda s, t: channel_attention(s) - 2 * channel_attention(t),
        lambda s, t: masks_of(s, t)["spatial_mask"],
        lambda s, t: masks_of(s, t)["channel_mask"],
        *LOSSES,
    ]
    for result in results:
        testing.assert_spatially_equivariant(result, *pair)


@each_symmetry
@each_kind
@given(st.data())
def test_moving_the_positions_moves_the_relation(kind, move, data):
    arguments = data.draw(relation_arguments(kind))
    close(RELATION[kind](*map(move, arguments)), move(RELATION[kind](*arguments)))


@each_symmetry
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gaussian"])
@given(st.data())
def test_moving_the_keys_alone_leaves_the_relation(kind, move, data):
    theta, phi, g = data.draw(relation_arguments(kind, (2, 3), (4, 3)))
    close(RELATION[kind](theta, move(phi), move(g)), RELATION[kind](theta, phi, g))


@each_loss
@given(pairs)
def test_student_and_teacher_have_the_same_distance_either_way(loss, pair):
    close(loss(*pair), loss(*reversed(pair)))


# --- what any distance promises, at any magnitude -------------------------------------------------


@pytest.mark.parametrize("holds", testing.DISTANCE, ids=lambda holds: holds.__name__)
@pytest.mark.parametrize("loss", [attention_transfer_loss, attention_masked_loss, non_local_loss])
def test_a_loss_is_a_distance(loss, holds):
    testing.check(loss, [holds])


@pytest.mark.parametrize("holds", testing.LOSS, ids=lambda holds: holds.__name__)
@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_a_module_with_adapters_keeps_what_any_loss_does(build, holds):
    unlike = testing.feature_pairs(channels=4, teacher_channels=3, magnitudes=[1e-3, 1.0])
    few = settings(max_examples=10, deadline=None)
    testing.check(build(4, 3).double(), [holds], pairs=unlike, settings=few)


# --- equality and descent -------------------------------------------------------------------------


@each_loss
@given(pairs, reductions)
def test_equal_features_give_0_with_gradient_0(loss, pair, reduction):
    reduced = functools.partial(loss, reduction=reduction)
    testing.assert_zero_at_equality(reduced, *pair)
    testing.assert_finite_gradient_at_equality(reduced, *pair)
    student = pair[0].clone().requires_grad_()
    reduced(student, pair[0]).sum().backward()
    close(student.grad, torch.zeros_like(student), 0.0)


@each_loss
@given(generic_pairs(), reductions)
def test_one_equal_image_leaves_the_gradient_finite(loss, pair, reduction):
    student, teacher = torch.cat([pair[0], pair[0]]).requires_grad_(), torch.cat(pair)
    loss(student, teacher, reduction=reduction).sum().backward()
    assert student.grad.isfinite().all()
    half = len(pair[0])
    close(student.grad[:half], torch.zeros_like(pair[0]), 0.0)
    assert student.grad[half:].any()


@each_loss
@given(pairs, reductions)
def test_one_gradient_step_lowers_the_loss(loss, pair, reduction):
    distance = masked_as(*pair) if loss is masked else loss
    reduced = functools.partial(distance, reduction=reduction)
    testing.assert_gradient_matches_finite_differences(reduced, *pair)
    testing.assert_descends(reduced, *pair)


@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
@given(generic_pairs())
def test_the_gradient_reaches_the_student_only(build, pair):
    channels = pair[0].shape[1]
    loss = build(channels, channels).double()
    testing.assert_gradient_reaches_student_only(loss, *pair)
    student = pair[0].clone().requires_grad_()
    loss(student, pair[1]).backward()
    assert student.grad.any()


# --- batches --------------------------------------------------------------------------------------


@each_loss
@given(generic_pairs())
def test_duplicating_the_batch(loss, pair):
    twice = [torch.cat([features, features]) for features in pair]
    ratio = {"mean": 1, "sum": 2, "norm": math.sqrt(2), "mean_square": 1}
    for reduction, expected in ratio.items():
        once = loss(*pair, reduction=reduction)
        close(loss(*twice, reduction=reduction) / once, expected)


@each_loss
@given(pairs)
def test_a_batch_has_the_losses_of_its_images(loss, pair):
    for reduction, rule in {
        "none": "mean",
        "mean": "mean",
        "sum": "sum",
        "mean_square": "mean",
    }.items():
        reduced = functools.partial(loss, reduction=reduction)
        testing.assert_batch_consistent(reduced, *pair, reduction=rule)


@each_loss
@given(pairs, seeds)
def test_the_mean_over_equal_ranks_is_the_mean_of_the_whole(loss, pair, seed):
    other = [normal(*features.shape, seed=seed + i) for i, features in enumerate(pair)]
    whole = [torch.cat(features) for features in zip(pair, other, strict=True)]
    close((loss(*pair) + loss(*other)) / 2, loss(*whole))


@each_kind
@given(st.data())
def test_a_relation_treats_each_image_alone(kind, data):
    arguments = data.draw(relation_arguments(kind))
    whole = RELATION[kind](*arguments)
    for b in range(len(whole)):
        close(RELATION[kind](*(x[b : b + 1] for x in arguments)), whole[b : b + 1])


# --- scale ----------------------------------------------------------------------------------------


@given(pairs, factors)
def test_attention_and_losses_are_linear_in_the_scale(pair, k):
    student, teacher = pair
    close(spatial_attention(-k * student), k * spatial_attention(student))
    close(channel_attention(-k * student), k * channel_attention(student))
    for loss in (attention_transfer_loss, attention_masked_loss, non_local_loss):
        close(loss(-k * student, -k * teacher) / k, loss(student, teacher))


@given(pairs, factors)
def test_signed_attention_is_odd(pair, k):
    for attention in (spatial_attention, channel_attention):
        close(attention(-k * pair[0], absolute=False), -k * attention(pair[0], absolute=False))


@given(pairs, factors, factors)
def test_a_mask_enters_the_masked_loss_by_its_square_root(pair, k, m):
    masks = masks_of(*pair)
    scaled = {"spatial_mask": k * masks["spatial_mask"], "channel_mask": m * masks["channel_mask"]}
    expected = attention_masked_loss(*pair, **masks)
    close(attention_masked_loss(*pair, **scaled) / math.sqrt(k * m), expected)


@given(st.data(), factors)
def test_the_dot_product_relation_is_cubic(data, k):
    theta, phi, g = data.draw(relation_arguments("dot_product"))
    expected = dot_product_relation(theta, phi, g)
    close(dot_product_relation(-k * theta, -k * phi, -k * g) / k**3, -expected)


@given(st.data(), factors)
def test_the_concatenation_relation_is_quadratic(data, k):
    theta, phi, g = data.draw(relation_arguments("concatenation"))
    expected = concatenation_relation(theta, phi, g)
    close(concatenation_relation(k * theta, k * phi, -k * g) / k**2, -expected)


@given(st.data(), factors)
def test_scale_multiplies_the_products_of_the_embedded_gaussian(data, k):
    theta, phi, g = data.draw(relation_arguments("embedded_gaussian"))
    expected = embedded_gaussian_relation(k * theta, phi, g)
    close(embedded_gaussian_relation(theta, phi, g, scale=k), expected)


@each_kind
@given(st.data(), factors)
def test_a_relation_is_linear_in_g(kind, data, k):
    *embedded, g = data.draw(relation_arguments(kind))
    other = normal(*g.shape, seed=3)
    separate = k * RELATION[kind](*embedded, g) + RELATION[kind](*embedded, other)
    close(RELATION[kind](*embedded, k * g + other), separate)


@pytest.mark.parametrize("kind", ["gaussian", "embedded_gaussian"])
@given(st.data())
def test_a_softmax_relation_averages_g(kind, data):
    *embedded, g = data.draw(relation_arguments(kind))
    relation = RELATION[kind](*embedded, g).flatten(2)
    g = g.flatten(2)
    assert (relation <= g.amax(2, keepdim=True) + 1e-12).all()
    assert (relation >= g.amin(2, keepdim=True) - 1e-12).all()


@each_kind
@given(st.data())
def test_repeating_every_key_leaves_the_relation(kind, data):
    """Every relation is a mean over the keys; the number of keys cancels."""
    arguments = data.draw(relation_arguments(kind))
    if kind == "gaussian":
        arguments = (arguments[0], *arguments)  # theta and phi are the features
    theta, phi, g = arguments
    relation = RELATION["embedded_gaussian" if kind == "gaussian" else kind]
    doubled = relation(theta, torch.cat([phi, phi], -1), torch.cat([g, g], -1))
    close(doubled, relation(theta, phi, g))


# --- relations and the double loop ----------------------------------------------------------------


@each_kind
@given(st.data())
def test_a_relation_equals_the_double_loop(kind, data):
    """Sequences, images and volumes; theta may have other positions, even of another rank."""
    query_positions, key_positions = data.draw(positions), data.draw(positions)
    arguments = data.draw(relation_arguments(kind, query_positions, key_positions))
    relation = RELATION[kind](*arguments)
    expected = getattr(reference, f"{kind}_relation")(*(x.numpy() for x in arguments))
    assert relation.shape == expected.shape
    close(relation, expected)


@given(
    st.lists(st.integers(-2, 2), min_size=1, max_size=6),
    st.lists(st.integers(-2, 2), min_size=1, max_size=6),
)
def test_the_concatenation_relation_equals_the_double_loop_at_ties(queries, keys):
    """Small integers: equal keys, and sums of exactly 0."""
    theta, phi = (torch.tensor([[x]], dtype=torch.float64) for x in (queries, keys))
    g = normal(1, 2, len(keys))
    expected = reference.concatenation_relation(theta.numpy(), phi.numpy(), g.numpy())
    close(concatenation_relation(theta, phi, g), expected)


@given(st.data())
def test_the_gaussian_is_the_embedded_gaussian_of_the_features(data):
    features, g = data.draw(relation_arguments("gaussian"))
    close(gaussian_relation(features, g), embedded_gaussian_relation(features, features, g))


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transfer", "masked"])  # a relation's g has a bias
@given(generic_pairs(), reductions)
def test_a_normalized_loss_of_a_student_of_zeros_is_1(name, pair, reduction):
    channels = pair[1].shape[1]
    loss = MODULES[name](channels, channels, normalize=True, reduction=reduction).double()
    value = loss(torch.zeros_like(pair[0]), pair[1])
    images = len(pair[0])
    expected = {"mean": 1, "sum": images, "none": torch.ones(images)}
    if reduction in expected:
        close(value, torch.as_tensor(expected[reduction]))


@given(generic_pairs(), factors)
def test_a_normalized_transfer_loss_does_not_depend_on_the_scale(pair, k):
    channels = pair[1].shape[1]
    loss = featkd.AttentionTransferLoss(channels, channels, normalize=True).double()
    close(loss(k * pair[0], k * pair[1]), loss(*pair))


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


# --- the standardised form ------------------------------------------------------------------------

STANDARDIZED = {
    "transfer": functools.partial(attention_transfer_loss, standardize=True),
    "masked": functools.partial(attention_masked_loss, standardize=True),
    "non_local": functools.partial(non_local_loss, standardize=True),
}
each_standardized = pytest.mark.parametrize("name", STANDARDIZED)


@each_standardized
@given(generic_pairs(), factors, factors)
def test_a_standardized_loss_is_free_of_scale(name, pair, a, b):
    """loss(k S, k T) = loss(S, T), and each side may have a factor of its own."""
    loss, (student, teacher) = STANDARDIZED[name], pair
    close(loss(a * student, b * teacher), loss(student, teacher), 1e-9)


@pytest.mark.parametrize("name", ["masked", "non_local"])
@given(generic_pairs(), seeds)
def test_a_standardized_loss_is_free_of_each_channel_s_scale_and_offset(name, pair, seed):
    loss, (student, teacher) = STANDARDIZED[name], pair
    channels = student.shape[1]
    scale = normal(2, channels, 1, 1, seed=seed).exp()
    offset = normal(2, channels, 1, 1, seed=seed + 1)
    changed = loss(scale[0] * student + offset[0], scale[1] * teacher + offset[1])
    close(changed, loss(student, teacher), 1e-7)


@each_standardized
@given(generic_pairs())
def test_a_standardized_loss_lies_between_0_and_2_a_map(name, pair):
    value = STANDARDIZED[name](*pair, reduction="none")
    maps = 2 if name == "transfer" else 1
    assert ((value >= 0) & (value <= 2 * maps + 1e-12)).all()
    opposite = STANDARDIZED[name](pair[0], -pair[0], reduction="none")
    if name != "transfer" and pair[0][0, 0].numel() > 1:
        close(opposite, torch.full_like(opposite, 2.0))


@given(generic_pairs())
def test_a_standardized_loss_is_1_less_the_correlation(pair):
    student, teacher = pair
    if student[0, 0].numel() == 1:
        return
    expected = [
        1 - torch.corrcoef(torch.stack([s.flatten(), t.flatten()]))[0, 1]
        for image in zip(student, teacher, strict=True)
        for s, t in zip(*image, strict=True)
    ]
    value = attention_masked_loss(student, teacher, standardize=True)
    close(value, torch.stack(expected).mean(), 1e-9)


@given(generic_pairs())
def test_standardized_features_have_mean_0_and_mean_square_1(pair):
    for over, dims in (("image", (2, 3)), ("batch", (0, 2, 3))):
        features = featkd.standardize(pair[0], over=over)
        close(features.mean(dims), torch.zeros(features.mean(dims).shape))
        square = features.square().mean(dims)
        close(square, (square > 0.5).double())
