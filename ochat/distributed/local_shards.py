"""Read which part of a sharded tensor this rank holds."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not frozen, by name: the optimizer updates them and a checkpoint holds them."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_range(tensor: Tensor) -> tuple[int, int]:
    """(first row, end) of the rows that this rank holds of a tensor; FSDP shards along rows."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    mesh = tensor.device_mesh  # its last dimension shards, as torch.chunk does; the one before replicates
    chunk = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    start = min(tensor.shape[0], chunk * mesh.get_local_rank(mesh.ndim - 1))
    return start, start + tensor.to_local().shape[0]


def global_offset(parameter: Tensor) -> int:
    """Index in the whole parameter, flattened, of the first element that this rank holds."""
    return row_range(parameter)[0] * (parameter.numel() // max(parameter.shape[0], 1))
