"""Reads which part of a sharded tensor this rank holds."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def rows(tensor: Tensor) -> tuple[int, int]:
    """The first row and the end of what this rank holds of a tensor that FSDP may have sharded along its rows."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    mesh = tensor.device_mesh  # the last dimension shards, as torch.chunk does; one before it replicates
    chunk = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    start = min(tensor.shape[0], chunk * mesh.get_local_rank(mesh.ndim - 1))
    return start, start + tensor.to_local().shape[0]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name: those that an optimizer updates and a checkpoint holds."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_element(parameter: Tensor) -> int:
    """Where in the whole parameter the part begins that this rank holds."""
    return rows(parameter)[0] * (parameter.numel() // max(parameter.shape[0], 1))
