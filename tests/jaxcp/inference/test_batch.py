# SPDX-License-Identifier: Apache-2.0
"""The numbers of rows that a step takes: each lies where its row does."""

import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxcp.inference.batch import FIELDS, STOPS, columns


@pytest.mark.parametrize(("axes", "rows"), [({"seq": 2}, 1), ({"data": 2}, 2)])
def test_columns_lie_where_their_rows_do(axes, rows, mesh_of):
    """A single row's too, which experts are told where it lies."""
    mesh_of(**axes)
    width = len(FIELDS) + STOPS + 1 + 3
    numbers = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    geometry = types.SimpleNamespace(ngram=1)
    there = jax.device_put(numbers, P("data"))
    found = jax.jit(lambda x: columns(x, geometry))(there)
    assert {tuple(x.sharding.spec)[:1] for x in found.values()} == {("data",)}
    assert found["before"].tolist() == numbers[:, FIELDS.index("before")].tolist()
    assert found["window"].tolist() == numbers[:, [len(FIELDS) + STOPS]].tolist()
    assert found["pages"].shape == (rows, 3)
