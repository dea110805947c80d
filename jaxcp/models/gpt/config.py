# SPDX-License-Identifier: Apache-2.0
"""The configuration of a GPT-2."""

import dataclasses

from jaxcp.layers.mlp import ACTIVATIONS
from jaxcp.layers.remat import Remat, check_remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT-2: `max_positions` is the longest sequence that its position table covers.

    Raises:
      ValueError: heads that do not divide the width, or an activation that it does not know.
    """

    vocab_size: int
    max_positions: int
    num_layers: int
    num_heads: int
    embed_dim: int
    mlp_dim: int | None = None
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    use_bias: bool = True
    tie_embeddings: bool = True
    """The head is the embedding."""
    dtype: str = "float32"
    remat: Remat = False
    """Policy of what the backward pass computes again (`layers.remat.POLICIES`)."""

    def __post_init__(self):
        check_remat(self.remat)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim; got {self.num_heads} and {self.embed_dim}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {sorted(ACTIVATIONS)}; got {self.activation!r}"
            )
        if self.mlp_dim is None:
            object.__setattr__(self, "mlp_dim", 4 * self.embed_dim)
