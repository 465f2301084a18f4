"""Feature-distillation losses for object detectors: Zhang & Ma, ICLR 2021, in pure PyTorch."""

from .distiller import Distiller
from .functional import (
    attention_maps,
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
    standardize,
)
from .losses.attention import AttentionMask, ChannelAttention, SpatialAttention
from .losses.masked import AttentionMaskedLoss
from .losses.non_local import NonLocalLoss
from .losses.non_local_block import NonLocalRelation
from .losses.overall import FeatureDistillationLoss
from .losses.transfer import AttentionTransferLoss
from .matching import match_layers
from .presets import (
    FPN_OUTPUTS,
    ONE_STAGE,
    RELEASED_ONE_STAGE,
    RELEASED_TWO_STAGE,
    STANDARDIZED,
    TWO_STAGE,
    Hyperparameters,
)
from .taps.layouts import PatchTokens, from_channels_last, from_tokens
from .taps.tap import FeatureTap

__version__ = "0.1.0"

__all__ = [
    "FPN_OUTPUTS",
    "ONE_STAGE",
    "RELEASED_ONE_STAGE",
    "RELEASED_TWO_STAGE",
    "STANDARDIZED",
    "TWO_STAGE",
    "AttentionMask",
    "AttentionMaskedLoss",
    "AttentionTransferLoss",
    "ChannelAttention",
    "Distiller",
    "FeatureDistillationLoss",
    "FeatureTap",
    "Hyperparameters",
    "NonLocalLoss",
    "NonLocalRelation",
    "PatchTokens",
    "SpatialAttention",
    "attention_maps",
    "attention_mask",
    "attention_masked_loss",
    "attention_transfer_loss",
    "channel_attention",
    "concatenation_relation",
    "dot_product_relation",
    "embedded_gaussian_relation",
    "from_channels_last",
    "from_tokens",
    "gaussian_relation",
    "match_layers",
    "non_local_loss",
    "spatial_attention",
    "standardize",
]
