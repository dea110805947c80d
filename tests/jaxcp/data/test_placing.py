# SPDX-License-Identifier: Apache-2.0
"""Rows that are read apart, and batches on the mesh, against NumPy."""

import jax
import numpy as np
import pytest

import jaxcp
from jaxcp.data.mixture import Mixture
from jaxcp.data.placing import put, share_of
from jaxcp.data.sources import TextSource, TokenFiles, checked


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for name, low in (("apart", 0), ("plain", 1)):
        rng.integers(low, 9, 500).astype("<u2").tofile(tmp_path / f"{name}.bin")
    return {
        "plain": TokenFiles(pattern=str(tmp_path / "plain.bin")),
        "apart": TokenFiles(pattern=str(tmp_path / "apart.bin"), separator=0),
    }


def sources(files):
    return {
        "text": TextSource(),
        **files,
        "mixture": Mixture(sources=(files["plain"], files["apart"]), weights=(0.5, 0.5)),
        "plain mixture": Mixture(sources=(files["plain"], TextSource()), weights=(0.9, 0.1)),
    }


@pytest.mark.parametrize("name", ["text", "plain", "apart", "mixture", "plain mixture"])
@pytest.mark.parametrize("only", [[0], [3, 5], range(6)])
def test_some_rows_are_those_of_the_batch(files, name, only):
    """Leaf by leaf; a leaf that one row needs stands in every part of the batch."""
    source = sources(files)[name]
    assert source.by_rows
    for step in range(3):
        batch, some = source.batch(step, 6, 20), source.some_rows(step, 6, 20, only)
        assert batch.keys() == some.keys()
        for key, x in batch.items():
            np.testing.assert_array_equal(some[key], x[list(only)])


def test_nothing_is_read_of_other_rows(files):
    source = files["plain"]
    reads = []
    stream = source.stream
    counted = type(stream).read

    def read(self, start, count):
        reads.append(start)
        return counted(self, start, count)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(stream), "read", read)
        source.some_rows(0, 6, 20, [2])
    assert reads == [stream.starts(0, 6, 20)[2]]


def test_batches_of_ones_own_are_not_read_in_part(files):
    class Doubled(TokenFiles):
        def batch(self, step, rows, length):
            return super().batch(2 * step, rows, length)

    class Turned(Mixture):
        def batch(self, step, rows, length):
            return super().batch(step + 1, rows, length)

    class Own:
        def batch(self, step, rows, length):
            return TextSource().batch(step, rows, length)

    plain = files["plain"]
    assert not Doubled(pattern=plain.pattern).by_rows
    assert not Turned(sources=(plain,), weights=(1.0,)).by_rows
    assert not Mixture(sources=(plain, Own()), weights=(0.5, 0.5)).by_rows
    nested = Mixture(sources=(plain,), weights=(1.0,))
    assert not Mixture(sources=(nested, plain), weights=(0.5, 0.5)).by_rows


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("axes", [{}, {"data": 2, "seq": 4}, {"data": 4, "seq": 2}], ids=str)
def test_each_device_has_its_rows_and_pieces(files, axes, accumulate):
    mesh = jaxcp.make_mesh(**axes, devices=jax.devices()[: 8 if axes else 1])
    batch = checked(files["apart"].batch(0, 8, 21), 16)
    layout = jaxcp.Zigzag()
    placed = put(batch, mesh=mesh, layout=layout, accumulate=accumulate)
    whole = layout.permute(batch, shards=mesh.shape["seq"])
    for key, x in placed.items():
        expected = whole[key].reshape(accumulate, 8 // accumulate, -1)
        data, seq = mesh.shape["data"], mesh.shape["seq"]
        for shard in x.addressable_shards:
            row, piece = (int(i[0]) for i in np.where(mesh.devices == shard.device)[:2])
            rows = np.split(expected, data, axis=1)[row]
            np.testing.assert_array_equal(shard.data, np.split(rows, seq, axis=2)[piece])


def test_one_process_reads_and_counts_all_rows():
    mesh = jaxcp.make_mesh(data=2, seq=4)
    share = share_of(mesh, 8, 2)
    np.testing.assert_array_equal(share.rows, np.arange(8))
    np.testing.assert_array_equal(share.counted, np.arange(8))
    with pytest.raises(ValueError, match="rows must divide by accumulate x data = 3 x 2"):
        share_of(mesh, 8, 3)
