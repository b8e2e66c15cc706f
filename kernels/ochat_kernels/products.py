"""Matrix products that are added to a sum of wider dtype: gradients of weights over chunks and micro-batches.

add_product(total, dlogits.t(), hidden, accumulate=True)     # total += dlogits.t() @ hidden
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> Tensor:
    """Writes a @ b, or adds it with `accumulate`, to `total`, which is returned; a (m, k), b (k, n), total (m, n) of
    their dtype or fp32.

    On CUDA one product: bf16 on the tensor cores, the sum in fp32 in registers and in memory. A CPU has no product of
    bf16 into fp32: it adds a product that was rounded to bf16. Costs: 2 m n k FLOPs; moves `total` once, twice with
    `accumulate`; no sync.
    """
    if total.dtype == a.dtype:
        return torch.addmm(total, a, b, out=total) if accumulate else torch.mm(a, b, out=total)
    if total.is_cuda:
        options = {"out_dtype": total.dtype, "out": total}
        return torch.addmm(total, a, b, **options) if accumulate else torch.mm(a, b, **options)
    return total.add_(a @ b) if accumulate else total.copy_(a @ b)
