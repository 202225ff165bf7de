"""The package's ops: checked public functions over `torch.ops.qcsbm`."""

from .asymmetry import asymmetry
from .attention_block import attention_block
from .bias_act import bias_act, bias_act_jvp
from .convolve import convolve, convolve_jvp, has_convolution, has_image_kernels
from .denoising_residual import denoising_residual
from .fir import fir
from .group_norm_silu import group_norm_silu, group_norm_silu_jvp
from .langevin_step import langevin_step
from .perturb import perturb
from .philox import philox_normal, philox_uniform, rademacher
from .res_block import res_block
from .scaled_add import scaled_add
from .sde_step import sde_step
from .softmax import softmax, softmax_jvp
from .split import split_float32
from .swish_mlp import swish_mlp, swish_mlp_jvp

__all__ = [
    "asymmetry",
    "attention_block",
    "bias_act",
    "bias_act_jvp",
    "convolve",
    "convolve_jvp",
    "denoising_residual",
    "fir",
    "group_norm_silu",
    "group_norm_silu_jvp",
    "has_convolution",
    "has_image_kernels",
    "langevin_step",
    "perturb",
    "philox_normal",
    "philox_uniform",
    "rademacher",
    "res_block",
    "scaled_add",
    "sde_step",
    "softmax",
    "softmax_jvp",
    "split_float32",
    "swish_mlp",
    "swish_mlp_jvp",
]
