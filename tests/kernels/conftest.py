"""Kernels are tested where they can run: on the card if there is one (harness.DEVICE), else in Triton's interpreter."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Unwritten memory reads as NaN, so that an element that a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)
