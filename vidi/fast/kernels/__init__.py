"""The fused operations in Triton, one function for each of `vidi.fast.twins`, with the same arguments.

Importing this package imports Triton: `vidi.fast.ops` does it where the model is on a GPU.
"""

from vidi.fast.kernels.attention import attend
from vidi.fast.kernels.product import gate_up_step, head_step, product_step, qkv_step
from vidi.fast.kernels.rows import add_norm, cut_patches, gated_mul, gelu_product, layer_norm, rms_norm

__all__ = [
    "add_norm",
    "attend",
    "cut_patches",
    "gate_up_step",
    "gated_mul",
    "gelu_product",
    "head_step",
    "layer_norm",
    "product_step",
    "qkv_step",
    "rms_norm",
]
