# SPDX-License-Identifier: Apache-2.0
"""The configuration of DeepSeek-V4."""

import dataclasses

from jaxcp.layers.compressed import SharedHeadDims
from jaxcp.layers.mla import IndexDims
from jaxcp.layers.remat import Remat, check_remat
from jaxcp.layers.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertDims:
    """The first `hash_layers` layers choose experts by token id, the others by score.

    `limit` cuts what the gate and up projections of every expert, the shared one too, hand on.
    """

    dim: int
    count: int
    per_tok: int
    shared: int = 1
    hash_layers: int = 0
    route_scale: float = 1.0
    limit: float

    def __post_init__(self):
        if not 1 <= self.per_tok <= self.count:
            raise ValueError(f"needs 1 <= per_tok <= count; got {self.per_tok} of {self.count}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamDims:
    """Residual streams, and how often the matrix that mixes them is normalised."""

    count: int
    iterations: int
    eps: float

    def __post_init__(self):
        if self.count < 1 or self.iterations < 1:
            raise ValueError(f"needs count and iterations of at least 1; got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekV4Config:
    """`layer_kinds`, a letter a layer: W a window alone, H and a compressed entry for every block
    of `heavy_ratio` tokens, C and those that an index selects among blocks of `sparse_ratio`.
    `num_mtp_layers`: 1 adds the layer that drafts the token after next, of kind W. Ratios, `window`
    and `max_positions` count tokens.

    Raises:
      ValueError: not one letter a layer, or a window or ratio below 1.
      NotImplementedError: more than one MTP layer.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    heads: SharedHeadDims
    layer_kinds: str
    sparse_ratio: int = 4
    heavy_ratio: int = 128
    window: int
    index: IndexDims
    experts: ExpertDims
    streams: StreamDims
    rope: Rope
    """Rotary positions of W layers."""
    compressed_rope: Rope
    """Rotary positions of C and H layers: queries, keys and entries."""
    max_positions: int
    norm_eps: float = 1e-6
    num_mtp_layers: int = 0
    dtype: str = "float32"
    remat: Remat = False
    """Policy of what the backward pass computes again (`layers.remat.POLICIES`)."""
    reproducible_experts: bool = False
    """MoE layers give the same bits on every mesh, slower (`MoE.reproducible`)."""

    def __post_init__(self):
        check_remat(self.remat)
        if len(self.layer_kinds) != self.num_layers or set(self.layer_kinds) - set("WCH"):
            raise ValueError(
                f"layer_kinds has a letter of W, C, H for each of {self.num_layers} layers; "
                f"got {self.layer_kinds!r}"
            )
        if self.num_mtp_layers not in (0, 1):
            raise NotImplementedError(
                "num_mtp_layers must be 0 or 1 (deeper drafts use the one layer again); "
                f"got {self.num_mtp_layers}"
            )
        if self.window < 1 or self.sparse_ratio < 1 or self.heavy_ratio < 1:
            raise ValueError(
                "window and ratios must be at least 1; "
                f"got {self.window}, {self.sparse_ratio} and {self.heavy_ratio}"
            )

    def kind(self, layer: int) -> str:
        """W, C or H. The layer after the last is the MTP layer: W."""
        return self.layer_kinds[layer] if layer < self.num_layers else "W"

    def ratio(self, layer: int) -> int:
        """Tokens of a compressed block; 0 where there are none."""
        return {"W": 0, "C": self.sparse_ratio, "H": self.heavy_ratio}[self.kind(layer)]
