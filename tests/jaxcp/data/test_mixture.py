# SPDX-License-Identifier: Apache-2.0
"""A mixture gives each source its share, and each goes through its own tokens once an epoch."""

import numpy as np
import pytest

from jaxcp.data.batch import checked
from jaxcp.data.mixture import Mixture
from jaxcp.data.sources import TokenFiles


@pytest.fixture
def sources(tmp_path):
    """Tokens 0 to 99; and 100 to 199, with documents."""
    np.arange(100, dtype="<u2").tofile(tmp_path / "a.bin")
    np.arange(100, 200, dtype="<u2").tofile(tmp_path / "b.bin")
    return (
        str(tmp_path / "a.bin"),
        TokenFiles(pattern=str(tmp_path / "b.bin"), separator=150),
    )


def test_shares_are_kept_and_every_token_of_a_source_is_seen_once_an_epoch(sources):
    mixture = Mixture(sources=sources, weights=(3, 1))
    rows = np.concatenate([mixture.batch(step, 16, 10)["tokens"] for step in range(64)])
    first = rows[rows[:, 0] < 100]
    assert len(rows) == 1024 and len(first) == 768
    epochs = first[:760].reshape(76, 100)
    assert (np.sort(epochs, axis=1) == np.arange(100)).all()


def test_a_batch_is_a_function_of_the_step_however_rows_are_grouped(sources):
    mixture = Mixture(sources=sources, weights=(0.5, 0.5), seed=3)
    whole = mixture.batch(0, 8, 10)
    halves = [Mixture(sources=sources, weights=(0.5, 0.5), seed=3).batch(i, 4, 10) for i in (0, 1)]
    assert whole.keys() == {"tokens", "targets", "segment_ids"}
    for name in whole:
        np.testing.assert_array_equal(whole[name], np.concatenate([half[name] for half in halves]))
    assert checked(whole, 200)["weights"].shape == (8, 10)


@pytest.mark.parametrize(
    ("weights", "match"),
    [((1,), "a weight for each"), ((1, 0), "a row of 1024"), ((1, 1e-9), "a row of 1024")],
)
def test_weights_that_cannot_be(sources, weights, match):
    with pytest.raises(ValueError, match=match):
        Mixture(sources=sources, weights=weights)
