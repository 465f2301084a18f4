"""Every formula of `featkd.functional` as NumPy float64 loops: slow, plain, and without torch.

They follow the paper and the table in the design word for word. The relations take any number of
position dimensions, and `theta` may have other positions than `phi` and `g`. The layers at the end
(convolution, linear map, max-pooling) let a test follow a whole module by loops.
"""

import math

import numpy as np

quiet = np.errstate(invalid="ignore", over="ignore")  # NaN and inf pass through without a warning


# --- attention ------------------------------------------------------------------------------------


@quiet
def spatial_attention(features, *, absolute=True):
    """G_s: (B, C, H, W) -> (B, H, W), the mean over the channels of |A|."""
    batch, channels, height, width = features.shape
    attention = np.zeros((batch, height, width))
    for b, c, i, j in np.ndindex(features.shape):
        value = features[b, c, i, j]
        attention[b, i, j] += (abs(value) if absolute else value) / channels
    return attention


@quiet
def channel_attention(features, *, absolute=True):
    """G_c: (B, C, H, W) -> (B, C), the mean over the positions of |A|."""
    batch, channels, height, width = features.shape
    attention = np.zeros((batch, channels))
    for b, c, i, j in np.ndindex(features.shape):
        value = features[b, c, i, j]
        attention[b, c] += (abs(value) if absolute else value) / (height * width)
    return attention


@quiet
def attention_maps(features, *, absolute=True):
    """G_s and G_c."""
    maps = spatial_attention, channel_attention
    return tuple(of(features, absolute=absolute) for of in maps)


@quiet
def softmax(logits):
    """Softmax of a one-dimensional array."""
    weights = np.exp(logits - np.max(logits))
    return weights / np.sum(weights)


@quiet
def attention_mask(student_attention, teacher_attention, *, temperature, fusion="logits"):
    """M_s or M_c: n softmax((a_S + a_T) / T) over all the elements of an image."""
    mask = np.zeros(student_attention.shape)
    for b in range(len(mask)):
        student, teacher = student_attention[b].ravel(), teacher_attention[b].ravel()
        if fusion == "logits":
            probabilities = softmax((student + teacher) / temperature)
        else:
            probabilities = (softmax(student / temperature) + softmax(teacher / temperature)) / 2
        mask[b] = (len(student) * probabilities).reshape(mask[b].shape)
    return mask


@quiet
def standardized(numbers):
    """The numbers less their mean, over their standard deviation; 0 where all are alike."""
    mean = sum(numbers.ravel()) / numbers.size
    deviation = math.sqrt(sum((x - mean) ** 2 for x in numbers.ravel()) / numbers.size)
    return (
        np.zeros(numbers.shape) if deviation <= 1e-15 * abs(mean) else (numbers - mean) / deviation
    )


def standardize_channels(features, *, over="image"):
    """Each channel of each image, or of the batch, standardised."""
    result = np.zeros(features.shape)
    for c in range(features.shape[1]):
        if over == "batch" and len(features):
            result[:, c] = standardized(features[:, c])
        for b in range(len(features) if over == "image" else 0):
            result[b, c] = standardized(features[b, c])
    return result


standardize = standardize_channels


# --- losses ---------------------------------------------------------------------------------------


def reduce(distances, reduction):
    """Reduce the (B,) distances; nothing to reduce is 0."""
    if reduction == "none":
        return np.array(distances)
    if reduction == "norm":
        return math.sqrt(sum(distance**2 for distance in distances))
    if reduction == "mean_square":
        return reduce([distance**2 for distance in distances], "mean")
    total = sum(distances)
    return total / len(distances) if reduction == "mean" and len(distances) else float(total)


@quiet
def half_mean_square(student, teacher, reduction):
    """Half the mean squared difference of each image, reduced."""
    halves = []
    for b in range(len(student)):
        total = 0.0
        for index in np.ndindex(student[b].shape):
            total += (student[b][index] - teacher[b][index]) ** 2
        halves.append(total / student[b].size / 2)
    return reduce(halves, reduction)


@quiet
def distance(student, teacher, reduction):
    """The L2 norm of student - teacher for each image, reduced."""
    distances = []
    for b in range(len(student)):
        total = 0.0
        for index in np.ndindex(student[b].shape):
            total += (student[b][index] - teacher[b][index]) ** 2
        distances.append(math.sqrt(total))
    return reduce(distances, reduction)


def attention_transfer_loss(
    student,
    teacher,
    *,
    spatial_adapter=lambda attention: attention,
    channel_adapter=lambda attention: attention,
    absolute=True,
    reduction="mean",
    standardize=False,
):
    """L_AT, equation (1): each of the two distances is reduced before they are added."""
    spatial = spatial_adapter(spatial_attention(student, absolute=absolute)[:, None])[:, 0]
    channel = channel_adapter(channel_attention(student, absolute=absolute))
    total = 0.0
    for ours, theirs in (
        (spatial, spatial_attention(teacher, absolute=absolute)),
        (channel, channel_attention(teacher, absolute=absolute)),
    ):
        if standardize:
            ours, theirs = (
                np.array([*map(standardized, x)]).reshape(x.shape) for x in (ours, theirs)
            )
            total = total + half_mean_square(ours, theirs, reduction)
        else:
            total = total + distance(ours, theirs, reduction)
    return total


@quiet
def attention_masked_loss(
    student, teacher, *, spatial_mask=None, channel_mask=None, reduction="mean", standardize=False
):
    """L_AM, equation (2); half the weighted mean square of standardised features."""
    if standardize:
        student, teacher = map(standardize_channels, (student, teacher))
    distances = []
    for b in range(len(student)):
        total = 0.0
        for c, i, j in np.ndindex(student[b].shape):
            weight = 1.0
            if spatial_mask is not None:
                weight *= spatial_mask[b, i, j]
            if channel_mask is not None:
                weight *= channel_mask[b, c]
            total += (teacher[b, c, i, j] - student[b, c, i, j]) ** 2 * weight
        distances.append(total / student[b].size / 2 if standardize else math.sqrt(total))
    return reduce(distances, reduction)


def non_local_loss(student_relation, teacher_relation, *, reduction="mean", standardize=False):
    """L_NLD: the L2 distance of two relations."""
    if standardize:
        relations = map(standardize_channels, (student_relation, teacher_relation))
        return half_mean_square(*relations, reduction)
    return distance(student_relation, teacher_relation, reduction)


# --- relations ------------------------------------------------------------------------------------


def _positions_as_one(features):
    return features.reshape(*features.shape[:2], math.prod(features.shape[2:]))


@quiet
def _relation(theta, phi, g, weights):
    """r_i = sum_j w_ij g_j, where weights(queries, keys, i) gives the row w_i of one image."""
    queries, keys, values = map(_positions_as_one, (theta, phi, g))
    batch, dimensions, count = values.shape
    relation = np.zeros((batch, dimensions, queries.shape[2]))
    for b, i in np.ndindex(batch, queries.shape[2]):
        row = weights(queries[b], keys[b], i)
        for d, j in np.ndindex(dimensions, count):
            relation[b, d, i] += row[j] * values[b, d, j]
    return relation.reshape(batch, dimensions, *theta.shape[2:])


def _products(queries, keys, i):
    products = np.zeros(keys.shape[1])
    for c, j in np.ndindex(keys.shape):
        products[j] += queries[c, i] * keys[c, j]
    return products


def embedded_gaussian_relation(theta, phi, g, *, scale=1.0):
    """r_i = softmax_j(scale theta_i . phi_j) g_j."""
    return _relation(theta, phi, g, lambda q, k, i: softmax(scale * _products(q, k, i)))


def gaussian_relation(features, g):
    """r_i = softmax_j(x_i . x_j) g_j."""
    return embedded_gaussian_relation(features, features, g)


def dot_product_relation(theta, phi, g):
    """r_i = (1/N) sum_j (theta_i . phi_j) g_j."""
    return _relation(theta, phi, g, lambda q, k, i: _products(q, k, i) / k.shape[1])


def concatenation_relation(theta, phi, g):
    """r_i = (1/N) sum_j relu(theta_i + phi_j) g_j."""
    return _relation(theta, phi, g, lambda q, k, i: np.maximum(q[0, i] + k[0], 0.0) / k.shape[1])


# --- layers ---------------------------------------------------------------------------------------


def convolution(features, weight, bias):
    """A convolution with stride 1 whose zero padding keeps the size."""
    batch, _, height, width = features.shape
    pad_h, pad_w = weight.shape[2] // 2, weight.shape[3] // 2
    result = np.zeros((batch, len(weight), height, width))
    for b, o, i, j in np.ndindex(result.shape):
        result[b, o, i, j] = bias[o]
        for c, di, dj in np.ndindex(weight.shape[1:]):
            y, x = i + di - pad_h, j + dj - pad_w
            if 0 <= y < height and 0 <= x < width:
                result[b, o, i, j] += weight[o, c, di, dj] * features[b, c, y, x]
    return result


def linear(features, weight, bias):
    """(B, C) -> (B, O)."""
    result = np.zeros((len(features), len(weight)))
    for b, o in np.ndindex(result.shape):
        result[b, o] = bias[o]
        for c in range(weight.shape[1]):
            result[b, o] += weight[o, c] * features[b, c]
    return result


def max_pool(features, size):
    """Max-pooling of whole size x size windows."""
    batch, channels, height, width = features.shape
    result = np.zeros((batch, channels, height // size, width // size))
    for b, c, i, j in np.ndindex(result.shape):
        window = features[b, c, i * size : (i + 1) * size, j * size : (j + 1) * size]
        result[b, c, i, j] = max(float(value) for value in window.ravel())
    return result
