# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on the GPU at hand: are they right, and how fast beside what others have.

    benchmarks/gpu.sh OUT_DIR                                      # everything, under 8 minutes
    python -m benchmarks.gpu OUT_DIR --parts check-attention       # one part
    python -m benchmarks.gpu OUT_DIR --smoke                       # tiny, interpreted, on CPU

Needs jax, jaxtyping, numpy and this repository as the working directory; no network.
"""
