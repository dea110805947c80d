# SPDX-License-Identifier: Apache-2.0
"""Drafts of an MTP layer over a cache, in turns."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcp.attention.over_cache import OverCache


def assert_in_turns(model, batch, expected, **bounds):
    """The drafts of two rows of 37 tokens are those of one pass, in two turns.

    Args:
      batch: host arrays `tokens`, `after` (of each depth) and `positions`.
      expected: logits of the drafts of the first depth.
    """
    cache = model.init_cache(batch_size=2, max_len=40)
    for part in (slice(0, 20), slice(20, 37)):
        arrays = (batch[k][:, part] for k in ("tokens", "after", "positions"))
        tokens, after, positions = map(jnp.asarray, arrays)
        found, cache = _drafted(model, cache, tokens, after[..., 0], positions)
        np.testing.assert_allclose(found, expected[:, part], **bounds)


@jax.jit
def _drafted(model, cache, tokens, after, positions):
    added = jnp.full(2, tokens.shape[1], jnp.int32)
    attend = OverCache(cache, positions, added, sharded=False)
    state, _ = model.trunk(tokens, positions, attend)
    found = model.logits(model.draft(state, after, positions, attend))
    return found, attend.cache_after(cache.recent)
