"""The one accuracy rule of the project: an operator may be at most twice as far from the truth as its definition is.

`|op - truth| <= 2 * |reference - truth| + atol`, elementwise against the worst element, truth in float64.
"""

import torch


def assert_close(op: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, atol: float) -> None:
    """Raises AssertionError with both errors if `op` is further from `truth` than the rule allows, or not finite."""
    assert op.shape == truth.shape
    assert torch.isfinite(op).all()
    op_error = (op.double() - truth.double()).abs().max().item() if op.numel() else 0.0
    reference_error = (reference.double() - truth.double()).abs().max().item() if op.numel() else 0.0
    assert op_error <= 2 * reference_error + atol, f"error {op_error:.3e}, the definition's is {reference_error:.3e}"


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """`||value - truth|| / ||truth||`, in float64."""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()
