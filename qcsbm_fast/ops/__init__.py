"""The package's ops: checked public functions over `torch.ops.qcsbm`."""

from .bias_act import bias_act, bias_act_jvp

__all__ = ["bias_act", "bias_act_jvp"]
