# SPDX-License-Identifier: Apache-2.0
"""The configuration of Qwen3-Next and Qwen3.5: recurrent layers, and some with full attention."""

import dataclasses

from jaxcp.layers.gated_delta import DeltaDims
from jaxcp.layers.remat import Remat, check_remat
from jaxcp.layers.rope import Rope

FORMATS = "qwen3_next", "qwen3_5_moe_text", "qwen3_5_text"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig:
    """Experts: so many, of which a token meets some, and one that all tokens meet."""

    count: int
    per_tok: int
    dim: int
    shared_dim: int
    normalise: bool = True
    """Weights of the chosen sum to one."""

    def __post_init__(self):
        if not 1 <= self.per_tok <= self.count:
            raise ValueError(f"needs 1 <= per_tok <= count; got {self.per_tok} of {self.count}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig:
    """`layer_pattern` is cycled over the layers: R, the gated delta rule; G, gated full attention.

    So is `mlp_pattern`: D, an MLP of width `mlp_dim`; E, experts. `num_mtp_layers`: 1 adds the
    layer that drafts the token after next, 0 leaves out the checkpoint's; None, as Qwen3-Next's
    config.json says nothing, is as the checkpoint has it. `dtype` is that of the computation.
    `format`: one of `FORMATS`, by whose names tensors and fields go.

    Raises:
      ValueError: sizes that contradict each other, naming both.
      NotImplementedError: more than one MTP layer.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    delta: DeltaDims
    rope: Rope = dataclasses.field(default_factory=lambda: Rope(part=0.25))
    layer_pattern: str = "RRRG"
    mlp_pattern: str = "E"
    mlp_dim: int | None = None
    experts: SparseConfig | None = None
    attention_bias: bool = False
    num_mtp_layers: int | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    """The head is the embedding."""
    trained_positions: int | None = None
    """The length that config.json says the model was trained for; limits nothing here."""
    format: str = "qwen3_next"
    dtype: str = "float32"
    remat: Remat = False
    """Policy of what the backward pass computes again (`layers.remat.POLICIES`)."""

    def __post_init__(self):
        check_remat(self.remat)
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {self.format!r}")
        for name, letters in (("layer_pattern", "RG"), ("mlp_pattern", "DE")):
            pattern = getattr(self, name)
            if not pattern or set(pattern) - set(letters):
                raise ValueError(f"{name} is made of {' and '.join(letters)}; got {pattern!r}")
        for letter, name in (("D", "mlp_dim"), ("E", "experts")):
            if letter in self.mlp_pattern and not getattr(self, name):
                raise ValueError(
                    f"an mlp_pattern with {letter} needs {name}; got mlp_pattern="
                    f"{self.mlp_pattern!r} and {name}={getattr(self, name)}"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads; got {self.num_kv_heads} and {self.num_heads}"
            )
        if self.num_mtp_layers not in (None, 0, 1):
            raise NotImplementedError(
                "num_mtp_layers must be 0 or 1 (deeper drafts use the one layer again); "
                f"got {self.num_mtp_layers}"
            )
        self.rope.turning(self.head_dim)

    def kind(self, layer: int) -> str:
        """R or G. The layer after the last is the MTP layer: G."""
        if layer >= self.num_layers:
            return "G"
        return self.layer_pattern[layer % len(self.layer_pattern)]

    def is_sparse(self, layer: int) -> bool:
        """Tell whether a layer has experts; the MTP layer, after the last, as the first has."""
        layer = 0 if layer >= self.num_layers else layer
        return self.mlp_pattern[layer % len(self.mlp_pattern)] == "E"

    @property
    def recurrent(self) -> bool:
        """Tell whether layers need the order of tokens (`WholeSequence.length`)."""
        return any(self.kind(i) == "R" for i in range(self.num_layers))

    @property
    def num_experts(self) -> int:
        return 0 if self.experts is None else self.experts.count

    @property
    def num_experts_per_tok(self) -> int:
        return 0 if self.experts is None else self.experts.per_tok
