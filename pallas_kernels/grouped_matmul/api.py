# SPDX-License-Identifier: Apache-2.0
"""Grouped matmul: rows sorted by group, one weight matrix a group."""

from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import resolve

IMPLEMENTATIONS = ("reference", "xla")


def grouped_matmul(
    lhs: Float[Array, "M D"],
    rhs: Float[Array, "E D F"],
    group_sizes: Int[Array, "E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """`out[m] = lhs[m] @ rhs[group of row m]`; rows lie sorted by group, groups may be empty.

    `group_sizes` sums to `M`. Accumulates in float32. Differentiable in `lhs` and `rhs`.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.

    >>> grouped_matmul(jnp.ones((4, 2)), jnp.ones((3, 2, 5)), jnp.array([1, 0, 3])).shape
    (4, 5)
    """
    if (
        lhs.ndim != 2
        or rhs.ndim != 3
        or lhs.shape[1] != rhs.shape[1]
        or group_sizes.shape != rhs.shape[:1]
    ):
        raise ValueError(
            "needs lhs [M,D], rhs [E,D,F], group_sizes [E]; "
            f"got {lhs.shape}, {rhs.shape}, {group_sizes.shape}"
        )
    backend = resolve("grouped_matmul", implementation, IMPLEMENTATIONS, {})
    return backend.forward(lhs, rhs, group_sizes)
