"""Every operator as Triton kernels: CUDA tensors, or CPU tensors in Triton's interpreter (see launch.py)."""

from ochat_kernels.adamw import adamw
from ochat_kernels.adamw_with_norm import adamw_with_norm
from ochat_kernels.fp8 import quantize_rows, quantize_transposed, scaled_product
from ochat_kernels.glu import geglu, geglu_fp8, swiglu, swiglu_fp8
from ochat_kernels.linear_cross_entropy import linear_cross_entropy
from ochat_kernels.qkv_norm_rope import qkv_norm_rope
from ochat_kernels.rms_norm import add_rms_norm, add_rms_norm_fp8, rms_norm, rms_norm_fp8
from ochat_kernels.rope import qkv_rope, rope

__all__ = [
    "adamw",
    "adamw_with_norm",
    "add_rms_norm",
    "add_rms_norm_fp8",
    "geglu",
    "geglu_fp8",
    "linear_cross_entropy",
    "qkv_norm_rope",
    "qkv_rope",
    "quantize_rows",
    "quantize_transposed",
    "rms_norm",
    "rms_norm_fp8",
    "rope",
    "scaled_product",
    "swiglu",
    "swiglu_fp8",
]
