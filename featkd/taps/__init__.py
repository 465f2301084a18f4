"""What listens to a model: forward hooks, the paths that name modules, and layouts of features."""

from .layouts import from_channels_last, from_tokens
from .tap import FeatureTap

__all__ = ["FeatureTap", "from_channels_last", "from_tokens"]
