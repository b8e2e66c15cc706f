"""Pick the device of a command that runs a model."""

from __future__ import annotations

from ochat.errors import ConfigError


def find_device(name: str) -> str:
    """`name` if torch has this device; for "auto" the GPU, or else the CPU. Raises: ConfigError listing the devices."""
    import torch

    present = ["cpu"]
    if torch.accelerator.is_available() and (kind := torch.accelerator.current_accelerator()) is not None:
        present += [kind.type, *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))]
    if name == "auto":
        return present[1] if len(present) > 1 else "cpu"
    if name not in present:
        raise ConfigError(f"--device {name}: no such device here; there is {', '.join(present)}")
    return name
