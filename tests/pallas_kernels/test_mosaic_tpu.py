# SPDX-License-Identifier: Apache-2.0
"""What only the TPU backend of flash attention does, in the interpreter."""

import pytest

from pallas_kernels.flash_attention import mosaic_tpu
from pallas_kernels.testing import Case, check


@pytest.mark.parametrize("documents", [1, 2])
def test_gradients_of_more_queries_than_vmem_holds(monkeypatch, documents):
    """128 queries at a time: the keys' gradients are sums over the parts."""
    monkeypatch.setattr(mosaic_tpu, "DQ_BYTES", 2 * 128 * mosaic_tpu.LANES * 4)
    check("mosaic_tpu", Case(queries=190, keys=140, heads=2, kv_heads=1, documents=documents))
