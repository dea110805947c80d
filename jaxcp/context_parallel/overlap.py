# SPDX-License-Identifier: Apache-2.0
"""Options of XLA with which transfers run while kernels do."""

from pallas_kernels.dispatch import target_platform

GPU_OPTIONS = {
    # without it a collective-permute is synchronous
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # K, V, dK and dV at once; by default one collective at a time may wait for a kernel
    "xla_gpu_experimental_parallel_collective_overlap_limit": 4,
}


def compiler_options(platform: str | None = None) -> dict[str, bool | int]:
    """For `jax.jit` around context-parallel attention: transfers beside kernels.

    Our own training step, prefill and scoring have them already. On CPU and TPU none are needed.

    Args:
      platform: "cpu", "gpu" (or "cuda"), "tpu"; None asks the mesh in scope, or else the default
        backend.

    >>> with jax.set_mesh(mesh):
    ...     step = jax.jit(step, compiler_options=compiler_options())
    """
    platform = target_platform() if platform is None else platform
    return dict(GPU_OPTIONS) if platform in ("gpu", "cuda") else {}
