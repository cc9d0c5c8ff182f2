"""minigpt: a GPT on tinytensor, trained on Shakespeare."""

from minigpt.config import PRESETS, GPTConfig, TrainConfig
from minigpt.model import GPT
from tinytensor import __version__

__all__ = ["GPT", "PRESETS", "GPTConfig", "TrainConfig", "__version__"]
