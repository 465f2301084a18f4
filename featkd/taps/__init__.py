"""What listens to a model: hooks on its modules, the paths that name them, layouts of features."""

from .layouts import PatchTokens, from_channels_last, from_tokens
from .tap import FeatureTap

__all__ = ["FeatureTap", "PatchTokens", "from_channels_last", "from_tokens"]
