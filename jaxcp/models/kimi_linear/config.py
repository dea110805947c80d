# SPDX-License-Identifier: Apache-2.0
"""The configuration of Kimi Linear: delta attention, and latent attention without positions."""

import dataclasses

from jaxcp.layers.gated_delta import DeltaDims
from jaxcp.layers.mla import LatentDims
from jaxcp.layers.remat import Remat, check_remat
from jaxcp.layers.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiLinearConfig:
    """`layer_pattern` is cycled over the layers: R, Kimi delta attention; G, latent attention.

    The first `first_dense_layers` have an MLP of width `mlp_dim` and no experts. `dtype` is that of
    the computation.

    Raises:
      ValueError: sizes that contradict each other, naming both.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    latent: LatentDims
    delta: DeltaDims
    mlp_dim: int
    moe_dim: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int = 1
    first_dense_layers: int = 1
    layer_pattern: str = "RRRG"
    routing: Routing = dataclasses.field(default_factory=Routing)
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    """The head is the embedding."""
    trained_positions: int | None = None
    """The length that config.json says the model was trained for; limits nothing here."""
    dtype: str = "float32"
    remat: Remat = False
    """Policy of what the backward pass computes again (`layers.remat.POLICIES`)."""

    def __post_init__(self):
        check_remat(self.remat)
        if not self.layer_pattern or set(self.layer_pattern) - set("RG"):
            raise ValueError(f"layer_pattern is made of R and G; got {self.layer_pattern!r}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                "needs 1 <= num_experts_per_tok <= num_experts; "
                f"got {self.num_experts_per_tok} of {self.num_experts}"
            )
        if not 0 <= self.first_dense_layers <= self.num_layers:
            raise ValueError(
                "needs 0 <= first_dense_layers <= num_layers; "
                f"got {self.first_dense_layers} of {self.num_layers}"
            )
        if self.delta.num_key_heads != self.delta.num_value_heads:
            raise ValueError(f"keys and values must have as many heads; got {self.delta}")
        self.routing.check(self.num_experts, self.num_experts_per_tok)

    def kind(self, layer: int) -> str:
        """R or G."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    @property
    def recurrent(self) -> bool:
        """Tell whether layers need the order of tokens (`WholeSequence.length`)."""
        return any(self.kind(i) == "R" for i in range(self.num_layers))
