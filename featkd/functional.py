"""The functions of featkd under one roof; their homes are the files of `featkd.losses`.

How exact they are, and where they overflow, is in `docs/numerics.md`.
"""

from .losses.attention import attention_maps, attention_mask, channel_attention, spatial_attention
from .losses.masked import attention_masked_loss
from .losses.non_local import non_local_loss
from .losses.relation import (
    concatenation_relation,
    dot_product_relation,
    embedded_gaussian_relation,
    gaussian_relation,
)
from .losses.standardize import standardize
from .losses.transfer import attention_transfer_loss

__all__ = [
    "attention_maps",
    "attention_mask",
    "attention_masked_loss",
    "attention_transfer_loss",
    "channel_attention",
    "concatenation_relation",
    "dot_product_relation",
    "embedded_gaussian_relation",
    "gaussian_relation",
    "non_local_loss",
    "spatial_attention",
    "standardize",
]
