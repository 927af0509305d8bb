"""Fused kernels for adapters on a frozen base, in Triton; `choice` says when a layer takes them.

    merged_weight      W0 + s f(BA), NF4 codes decoded on the way        -> merged_linear     one product a pass
    factor_gradients   dL/dA and dL/dB of s f(BA)                        -> separate_linear   dropout, and LoRA on bf16 and FP4
    fused_output       which of the two products a layer's pass is
    fp8_product        G for them from FP8                               -> fp8_gate          where its error is bounded
    fp8_readings       what that multiplies, and the linear part of dL/dA and dL/dB, from two readings of g and x
    nf4, curves, portable    what they are made of          workspace, held    where matrices live, and when tensors are saved

One operation a file, with its maths, a plain reference in fp64 beside it, and tests against that on odd shapes. A kernel for
another family (AuroRA's spline, RanLoRA's and NEAT's activations on the rank axis) is another file of this kind.
"""

from curvelora.kernels.choice import fp8_record, fused_layers, use_kernels

__all__ = ["fp8_record", "fused_layers", "use_kernels"]
