"""Property tests for a loss of your own: hypothesis strategies and named assertions.

A loss is any callable `(student, teacher) -> Tensor` of feature maps `(B, C, H, W)` whose value is
a scalar or `(B,)`. Every `assert_...` takes the loss and two given tensors; :func:`check` runs many
of them over pairs that hypothesis draws and reports the smallest that fails.

Needs hypothesis: `pip install featkd[testing]`. Nothing else in featkd imports this package.
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("`featkd.testing` needs hypothesis: pip install featkd[testing].") from error

from ._check import DISTANCE, LOSS, check
from ._gradients import (
    assert_descends,
    assert_finite_gradient_at_equality,
    assert_gradient_matches_finite_differences,
    assert_gradient_reaches_student_only,
)
from ._invariances import (
    assert_channel_permutation_invariant,
    assert_layout_independent,
    assert_spatially_equivariant,
)
from ._strategies import LAYOUTS, feature_maps, feature_pairs
from ._values import (
    assert_batch_consistent,
    assert_nan_is_not_hidden,
    assert_non_negative,
    assert_zero_at_equality,
)

__all__ = [
    "DISTANCE",
    "LAYOUTS",
    "LOSS",
    "assert_batch_consistent",
    "assert_channel_permutation_invariant",
    "assert_descends",
    "assert_finite_gradient_at_equality",
    "assert_gradient_matches_finite_differences",
    "assert_gradient_reaches_student_only",
    "assert_layout_independent",
    "assert_nan_is_not_hidden",
    "assert_non_negative",
    "assert_spatially_equivariant",
    "assert_zero_at_equality",
    "check",
    "feature_maps",
    "feature_pairs",
]
