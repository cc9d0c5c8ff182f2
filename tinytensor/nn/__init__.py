"""Neural network building blocks with PyTorch's names."""

from tinytensor.nn import init
from tinytensor.nn.layers import Dropout, Embedding, LayerNorm, Linear, RMSNorm
from tinytensor.nn.module import Module, ModuleList, Parameter, Sequential

__all__ = [
    "Dropout",
    "Embedding",
    "LayerNorm",
    "Linear",
    "Module",
    "ModuleList",
    "Parameter",
    "RMSNorm",
    "Sequential",
    "init",
]
