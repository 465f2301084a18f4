"""The functions of featkd under one roof; their homes are the modules below."""

from .attention import attention_mask, channel_attention, spatial_attention
from .masked import attention_masked_loss
from .relation import (
    concatenation_relation,
    dot_product_relation,
    embedded_gaussian_relation,
    gaussian_relation,
    non_local_loss,
)
from .transfer import attention_transfer_loss

__all__ = [
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
]
