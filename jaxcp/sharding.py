# SPDX-License-Identifier: Apache-2.0
"""Maps the logical axes of a parameter to mesh axes."""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

RULES: dict[str, str | None] = {
    "heads": "model",  # attention heads are independent until the output projection sums them
    "kv_heads": "model",
    "mlp": "model",  # feed-forward widths, of each expert too: summed by the down projection
    "embed": None,  # the residual stream is whole on every device, so norms need no communication
    "head_dim": None,
    "latent": None,  # narrow, and all heads read it
    "head_groups": "model",  # groups of an output projection: heads lie with theirs
    "group_heads": None,  # within such a group
    "index_heads": None,  # an indexer is small, and every device scores for all its queries
    "vocab": None,  # the loss and the sampler read whole rows
    "experts": "expert",  # or another axis, see `place`: tokens travel to their experts
    "choices": None,  # a router's columns: every device chooses among all experts
    "positions": None,
    "window": None,  # an n-gram embedding is small
    "ngram": None,
    "layers": None,  # every device runs all layers (`layers.stack`)
    "parts": None,  # embedding and state, which an MTP layer joins
    "places": None,  # places of tokens within their block
    "mixes": None,  # coefficients of hyper-connections
}


def sharding_of(variable: nnx.Variable, experts: str = "expert") -> P:
    """The `PartitionSpec` of a parameter under `RULES`; replicated if it names no axes."""
    rules = RULES | {"experts": experts}
    axes = variable.get_metadata().get("axes") or ()
    return P(*(None if axis is None else rules[axis] for axis in axes))


def tokens_spec(x) -> P | None:
    """The `PartitionSpec` of the leading `[B, T]` of an explicit array; None without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    spec = jax.typeof(x).sharding.spec
    return P(*(*spec, None, None)[:2])
