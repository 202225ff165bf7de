"""A module's weights in shares, one for each process (FSDP2), and as a whole again.

Between two steps a process holds its share of weights, gradients, Adam's moments and averages; a step gathers the
weights and lets them go again. What is saved is whole: any number of processes reads it, with or without shares.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

T = TypeVar("T")


def shard(module: nn.Module) -> None:
    """Leaves each process its share of the parameters; the module must be called through `module(...)` by all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other layout
    device = next(module.parameters()).device.type
    fully_shard(module, mesh=init_device_mesh(device, (torch.distributed.get_world_size(),)))


def own(tensor: Tensor) -> Tensor:
    """This process's share of a parameter, as a plain tensor in the same memory."""
    return tensor.to_local() if _is_shared(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def whole(value: T) -> T:
    """`value`, nested containers and tensors, with every share made whole; to be called by all processes."""
    return tree_map(lambda leaf: leaf.full_tensor() if _is_shared(leaf) else leaf, value)


def load(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads whole weights into a module that may be in shares. Raises RuntimeError where they do not fit."""
    held = module.state_dict()
    module.load_state_dict({name: _share(value, held.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads whole moments beside parameters that may be in shares, in their layout: fused Adam reads both in step."""
    optimizer.load_state_dict(state)
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                shared = _share(value, parameter)
                entries[name] = torch.empty_like(parameter).copy_(shared)


def _is_shared(value: object) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def _share(value: Tensor, like: Tensor | None) -> Tensor:
    if like is None or not _is_shared(like) or _is_shared(value) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device).contiguous()
    return distribute_tensor(
        value,
        like.device_mesh,  # pyright: ignore[reportAttributeAccessIssue]
        like.placements,  # pyright: ignore[reportAttributeAccessIssue]
        src_data_rank=None,  # all have the whole: nothing is sent
    )
