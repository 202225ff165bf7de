"""The package's ops: checked public functions over `torch.ops.qcsbm`."""

from .asymmetry import asymmetry
from .bias_act import bias_act, bias_act_jvp
from .denoising_residual import denoising_residual
from .langevin_step import langevin_step
from .perturb import perturb
from .philox import philox_normal, philox_uniform, rademacher
from .sde_step import sde_step

__all__ = [
    "asymmetry",
    "bias_act",
    "bias_act_jvp",
    "denoising_residual",
    "langevin_step",
    "perturb",
    "philox_normal",
    "philox_uniform",
    "rademacher",
    "sde_step",
]
