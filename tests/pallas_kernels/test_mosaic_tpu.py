# SPDX-License-Identifier: Apache-2.0
"""What only the TPU backend of flash attention does, in the interpreter."""

import jax
import numpy as np
import pytest

from pallas_kernels.flash_attention import PAD_POSITION, mosaic_tpu, mosaic_tpu_tile
from pallas_kernels.testing.flash_attention import Case, check


@pytest.mark.parametrize("documents", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gradients_of_more_queries_than_vmem_holds(monkeypatch, documents):
    """128 queries at a time: the keys' gradients are sums over the parts."""
    monkeypatch.setattr(mosaic_tpu, "DQ_BYTES", 2 * 128 * mosaic_tpu.LANES * 4)
    check("mosaic_tpu", Case(queries=190, keys=140, heads=2, kv_heads=1, documents=documents))


@pytest.mark.parametrize("carry", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("scale", [0.2, 2.0])
def test_with_and_without_a_bound_on_the_scores(monkeypatch, scale, carry):
    """A head whose scores could overflow an exponential takes the online softmax, no other does."""
    said = []
    safe = mosaic_tpu.within_bound
    monkeypatch.setattr(mosaic_tpu, "within_bound", lambda *args: noted(safe(*args)))

    def noted(flags):
        jax.debug.callback(said.append, flags)
        return flags

    case = Case(queries=150, keys=150, scale=scale, carry=carry, documents=2, layout="zigzag")
    check("mosaic_tpu", case)
    jax.effects_barrier()
    assert {int(x) for flags in said for x in np.ravel(flags)} == {int(scale < 1)}


def test_the_bound_counts_what_is_seen_and_refuses_nan():
    q, k = np.ones((2, 1, 4, 2, 32), np.float32)
    positions, pads = np.arange(4, dtype=np.int32)[None], np.full((1, 4), PAD_POSITION, np.int32)

    def safe(k, kv_positions, lse=None, soft_cap=None):
        found = mosaic_tpu.within_bound(q, k, positions, kv_positions, lse, soft_cap, scale=1.0)
        return np.asarray(found)[0].tolist()

    assert safe(k, positions) == [1, 1]
    one = k * np.array([1, 2])[:, None].astype(np.float32)
    assert safe(one, positions) == [1, 0]  # 64 natural units are 92 in log2
    assert safe(one, positions, soft_cap=30.0) == [1, 1]
    assert safe(one * np.nan, positions) == [0, 0]
    assert safe(one, pads) == [1, 1]
    assert safe(k, positions, lse=np.full((1, 4, 2), -100, np.float32)) == [0, 0]
    assert safe(k, positions, lse=np.full((1, 4, 2), -np.inf, np.float32)) == [1, 1]


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 128, 100])
def test_blocks_on_the_diagonal(monkeypatch, window):
    """Their code knows the mask; a window that cuts the block does not let it run."""
    monkeypatch.setattr(mosaic_tpu_tile, "EDGE", 64)
    check("mosaic_tpu", Case(queries=256, keys=256, window=window, kv_heads=1))


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dtype"),
    [(32, None, "float16"), (320, 512, "bfloat16"), (512, 272, "float32")],
)
def test_float16_and_head_dims_to_512(head_dim, value_dim, dtype):
    shape = dict(queries=130, keys=130, head_dim=head_dim, value_dim=value_dim, kv_heads=1)
    check("mosaic_tpu", Case(dtype=dtype, carry=dtype == "float16", **shape))
