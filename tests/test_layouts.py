"""Channels-last maps and tokens as feature maps: the elements, the gradients and the errors."""

import pytest
import torch
from cases import close, normal
from models import raises

import featkd
from featkd import from_channels_last, from_tokens

MAPS = normal(2, 5, 3, 4)
CHANNELS_LAST = MAPS.permute(0, 2, 3, 1).contiguous()
TOKENS = CHANNELS_LAST.reshape(2, 12, 5)


def test_channels_last_maps_are_read_element_by_element():
    close(from_channels_last(CHANNELS_LAST), MAPS, 0.0)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_are_read_row_by_row_behind_their_prefix(prefix):
    tokens = torch.cat([normal(2, prefix, 5, seed=1), TOKENS], dim=1)
    close(from_tokens(tokens, (3, 4), prefix=prefix), MAPS, 0.0)
    close(from_tokens(tokens, [3, 4], prefix=prefix), MAPS, 0.0)


CALLS = {
    "channels last": (from_channels_last, CHANNELS_LAST),
    "tokens": (lambda tokens: from_tokens(tokens, (3, 4)), TOKENS),
    "tokens behind a prefix": (lambda tokens: from_tokens(tokens, (1, 11), prefix=1), TOKENS),
}
each_call = pytest.mark.parametrize(("call", "features"), CALLS.values(), ids=CALLS)


@each_call
def test_gradients_go_back_to_where_they_came_from(call, features):
    assert torch.autograd.gradcheck(call, features.clone().requires_grad_())


@each_call
def test_nothing_is_copied_and_no_dtype_changed(call, features):
    assert call(features).data_ptr() >= features.data_ptr()
    assert call(features).untyped_storage().data_ptr() == features.untyped_storage().data_ptr()
    assert call(features.half()).dtype == torch.float16


@each_call
def test_an_empty_batch(call, features):
    assert call(features[:0]).shape[0] == 0


@each_call
def test_compiled(call, features, fresh_compiler):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    close(compiled(features), call(features), 0.0)


MISUSE = {
    "maps of another kind": (TypeError, lambda: from_channels_last([1.0]), "`features`"),
    "integers": (TypeError, lambda: from_channels_last(CHANNELS_LAST.long()), "`features`"),
    "maps of another rank": (ValueError, lambda: from_channels_last(TOKENS), "(2, 12, 5)"),
    "tokens of another kind": (TypeError, lambda: from_tokens(None, (3, 4)), "`tokens`"),
    "tokens of another rank": (
        ValueError,
        lambda: from_tokens(CHANNELS_LAST, (3, 4)),
        "(2, 3, 4, 5)",
    ),
    "another count": (
        ValueError,
        lambda: from_tokens(TOKENS, (3, 5), prefix=1),
        "(B, 16, C), 1 + 3 x 5 tokens",
    ),
    "the count that was found": (ValueError, lambda: from_tokens(TOKENS, (3, 5)), "(2, 12, 5)"),
    "a size that is no pair": (TypeError, lambda: from_tokens(TOKENS, 12), "`size`"),
    "a height of another kind": (TypeError, lambda: from_tokens(TOKENS, (3.0, 4)), "`size[0]`"),
    "no width": (ValueError, lambda: from_tokens(TOKENS, (12, 0)), "`size[1]`"),
    "a negative prefix": (ValueError, lambda: from_tokens(TOKENS, (3, 4), prefix=-1), "`prefix`"),
    "a prefix of another kind": (
        TypeError,
        lambda: from_tokens(TOKENS, (3, 4), prefix=None),
        "`prefix`",
    ),
}


@pytest.mark.parametrize(("error", "call", "mention"), MISUSE.values(), ids=MISUSE)
def test_misuse(error, call, mention):
    raises(error, call, mention)


def test_both_are_public():
    assert {"from_channels_last", "from_tokens"} <= set(featkd.__all__)
