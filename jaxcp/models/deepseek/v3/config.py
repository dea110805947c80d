# SPDX-License-Identifier: Apache-2.0
"""The configuration of DeepSeek-V3 and V3.2."""

import dataclasses
import math

from jaxcp.layers.mla import IndexDims, LatentDims
from jaxcp.layers.remat import Remat, check_remat
from jaxcp.layers.rope import Rope
from jaxcp.layers.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekV3Config:
    """The shape of a DeepSeek-V3; with an `index` that of V3.2, whose layers attend to the
    `index.top_k` keys of best score.

    Raises:
      ValueError: sizes that cannot work, such as expert groups that do not divide the experts.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    latent: LatentDims
    index: IndexDims | None = None
    mlp_dim: int
    moe_dim: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int = 1
    first_dense_layers: int = 1
    routing: Routing
    rope: Rope
    mscale_all_dim: float = 0.0
    """YaRN's correction of the softmax: scores times `(0.1 * this * ln(factor) + 1) ** 2`."""
    max_positions: int
    norm_eps: float = 1e-6
    num_mtp_layers: int = 0
    """1 adds the layer that drafts the token after next."""
    dtype: str = "float32"
    remat: Remat = False
    """Policy of what the backward pass computes again (`layers.remat.POLICIES`)."""
    reproducible_experts: bool = False
    """MoE layers give the same bits on every mesh, slower (`MoE.reproducible`)."""

    def __post_init__(self):
        check_remat(self.remat)
        if not 0 <= self.first_dense_layers <= self.num_layers:
            raise ValueError(
                "needs 0 <= first_dense_layers <= num_layers; "
                f"got {self.first_dense_layers} of {self.num_layers}"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                "needs 1 <= num_experts_per_tok <= num_experts; "
                f"got {self.num_experts_per_tok} of {self.num_experts}"
            )
        self.routing.check(self.num_experts, self.num_experts_per_tok)
        if self.num_mtp_layers not in (0, 1):
            raise NotImplementedError(
                "num_mtp_layers must be 0 or 1 (deeper drafts use the one layer again); "
                f"got {self.num_mtp_layers}"
            )

    @property
    def attention_scale(self) -> float:
        """The factor of `q . k`."""
        factor = 1.0 if self.rope.yarn is None else self.rope.yarn.factor
        gain = 0.1 * self.mscale_all_dim * math.log(factor) + 1 if factor > 1 else 1.0
        return (self.latent.nope_dim + self.latent.rope_dim) ** -0.5 * gain**2
