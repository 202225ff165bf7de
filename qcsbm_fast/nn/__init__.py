"""Networks and layers that run on plain tensors and on duals through the same lines."""

from .autoencoder import Autoencoder
from .image_mlp import ImageMLP
from .layers import Activation, Linear, LinearSwish, LogFourierEmbedding, bias_act
from .toy_mlp import ToyMLP

__all__ = [
    "Activation",
    "Autoencoder",
    "ImageMLP",
    "Linear",
    "LinearSwish",
    "LogFourierEmbedding",
    "ToyMLP",
    "bias_act",
]
