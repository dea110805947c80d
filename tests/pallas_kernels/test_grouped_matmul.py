# SPDX-License-Identifier: Apache-2.0
"""Both implementations of the grouped matmul, against a float64 loop over groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul.api import IMPLEMENTATIONS

GROUPS = {
    "even": [8, 8, 8],
    "uneven": [3, 20, 1],
    "empty first, middle and last": [0, 5, 0, 0, 12, 0],
    "one takes all": [0, 17, 0],
    "more than a tile": [200, 0, 131],
    "none has a row": [0, 0],
}
# greatest error, as a part of the greatest entry
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def expected(lhs, rhs, sizes, dout):
    out, dlhs, drhs = np.zeros(dout.shape), np.zeros(lhs.shape), np.zeros(rhs.shape)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = lhs[rows] @ rhs[group]
        dlhs[rows] = dout[rows] @ rhs[group].T
        drhs[group] = lhs[rows].T @ dout[rows]
        start += size
    return out, dlhs, drhs


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_a_float64_loop(implementation, sizes, dtype):
    rng = np.random.default_rng(0)
    shapes = (sum(sizes), 24), (len(sizes), 24, 40), (sum(sizes), 40)
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]

    @jax.jit
    def run(lhs, rhs, dout):
        def forward(lhs, rhs):
            return grouped_matmul(lhs, rhs, jnp.asarray(sizes), implementation=implementation)

        out, pullback = jax.vjp(forward, lhs, rhs)
        return out, *pullback(dout)

    got = run(*map(jnp.asarray, arrays))
    lhs, rhs, dout = (x.astype(np.float64) for x in arrays)
    for name, a, b in zip(
        ("out", "dlhs", "drhs"), got, expected(lhs, rhs, sizes, dout), strict=True
    ):
        assert a.dtype == dtype and a.shape == b.shape
        error = np.abs(np.asarray(a, np.float64) - b).max(initial=0)
        assert error <= TOLERANCE[dtype] * max(1.0, np.abs(b).max(initial=0)), name


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="group_sizes"):
        grouped_matmul(jnp.ones((4, 2)), jnp.ones((3, 5, 2)), jnp.array([1, 0, 3]))
    with pytest.raises(ValueError, match="implementation"):
        grouped_matmul(
            jnp.ones((4, 2)), jnp.ones((3, 2, 5)), jnp.array([1, 0, 3]), implementation="triton"
        )
