"""minigpt: a GPT on tinytensor, trained on Shakespeare."""

from minigpt.config import PRESETS, GPTConfig, TrainConfig
from minigpt.model import GPT

__all__ = ["GPT", "PRESETS", "GPTConfig", "TrainConfig"]
