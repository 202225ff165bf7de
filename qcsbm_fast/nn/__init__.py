"""Networks and layers that run on plain tensors and on duals through the same lines."""

from .autoencoder import Autoencoder
from .image_mlp import ImageMLP
from .layers import Activation, Linear, LinearSwish, LogFourierEmbedding, bias_act
from .ncsnpp import NCSNpp, NCSNppConfig
from .reference_weights import (
    from_reference_state_dict,
    load_reference_checkpoint,
    to_reference_state_dict,
)
from .toy_mlp import ToyMLP

__all__ = [
    "Activation",
    "Autoencoder",
    "ImageMLP",
    "Linear",
    "LinearSwish",
    "LogFourierEmbedding",
    "NCSNpp",
    "NCSNppConfig",
    "ToyMLP",
    "bias_act",
    "from_reference_state_dict",
    "load_reference_checkpoint",
    "to_reference_state_dict",
]
