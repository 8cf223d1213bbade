"""Error bounds of the ops, relative to what the same maths loses in plain PyTorch.

A kernel's error is its distance from the reference in float64. It is compared with the error of a plain PyTorch
computation at the precision that the kernel promises (fp32 accumulation; inputs and output of the model's dtype), so a
bound says "as good as PyTorch", whatever the scale of the data. The factor allows another order of summation.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 4.0  # times PyTorch's own error
FLOOR = 1e-6  # of the largest value: below, a lucky PyTorch run would forbid ordinary rounding
# Codes may differ from the reference where two centroids are equally near to this relative accuracy.
CODE_DISTANCE = 1e-5


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinities must agree exactly, NaN counts as infinite."""
    actual, truth = actual.double(), truth.double()
    same = actual == truth  # also where both are the same infinity
    return (
        torch.where(same, 0.0, (actual - truth).abs().nan_to_num(nan=float("inf"))).max().item()
        if same.numel()
        else 0.0
    )


def assert_as_good_as(actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """``actual`` is no further from ``truth`` than `FACTOR` times ``plain``, a PyTorch run at the same precision."""
    scale = truth.double().nan_to_num(neginf=0.0, posinf=0.0).abs().max().item() if truth.numel() else 0.0
    bound = FACTOR * error(plain, truth) + FLOOR * scale
    got = error(actual, truth)
    assert got <= bound, (
        f"error {got:.3g} exceeds {bound:.3g} (plain PyTorch: {error(plain, truth):.3g}, scale {scale:.3g})"
    )
