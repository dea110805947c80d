# SPDX-License-Identifier: Apache-2.0
"""The configuration of a hybrid MoE: Hy3, Qwen3-MoE, gpt-oss, GLM-4.5, MiniMax-M2,
MiMo-V2-Flash, and any mixture of their features."""

import dataclasses

from jaxcp.layers.mlp import SILU, SwiGLU
from jaxcp.layers.remat import Remat, check_remat
from jaxcp.layers.rope import LATER, Rope
from jaxcp.layers.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of one kind of layers.

    Raises:
      ValueError: sizes that contradict each other, naming both.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    """Channels of a value; `head_dim` are those of a query and a key."""
    rope: Rope = dataclasses.field(default_factory=Rope)
    sinks: bool = False
    """A learned logit a head that joins the softmax and whose probability is dropped."""

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads; got {self.num_kv_heads} and {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions; got {self.head_dim}")
        self.rope.turning(self.head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    rope: Rope = dataclasses.field(default_factory=Rope)
    qk_norm: bool = True
    qk_norm_together: bool = dataclasses.field(default=False, metadata=LATER)
    """QK norm is over all heads of a token, not over each."""
    use_bias: bool = False
    output_bias: bool | None = None
    """A bias of the output, where not as `use_bias`."""
    sinks: bool = False
    """See `Heads`."""
    value_dim: int | None = None
    """Channels of a value, where not `head_dim`."""
    value_scale: float = dataclasses.field(default=1.0, metadata=LATER)
    """Factor of values."""
    full: Heads | None = None
    """Heads of G and N layers, where they are others: full attention pays for each."""
    max_positions: int | None = None
    """The words of config.json on the lengths a model was trained for; limits nothing here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    num_shared: int = 1
    """Experts that every token goes through, as one MLP of that many widths."""
    routing: Routing = dataclasses.field(default_factory=Routing)
    activation: SwiGLU = SILU
    use_bias: bool = False
    float32_sum: bool = False
    """Routed and shared experts are added in float32 and rounded once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    eps: float = 1e-5
    float32_scale: bool = False
    """Rounded after the scale, not before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGramConfig:
    """Tokens that the embedding sees: width 1 is the token itself, 12 adds the eleven before."""

    width: int = 1
    dim: int = 16

    def __post_init__(self):
        if self.width < 1 or self.dim < 1:
            raise ValueError(
                f"ngram: width and dim must be at least 1; got {self.width} and {self.dim}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridMoEConfig:
    """`layer_pattern` is cycled over the layers.

    G: full attention with rotary positions (all of Hy3), L: sliding window with rotary positions,
    N: full attention without positions. The first `first_dense_layers` have an MLP of width
    `mlp_dim` and no experts. `num_mtp_layers`: 1 adds the layer that drafts the token after next,
    0 leaves out the checkpoint's; None, as MiMo's config.json says nothing, is as the checkpoint
    has it. `window` counts tokens, a token's own included. `dtype` is that of the computation.

    Raises:
      ValueError: sizes that contradict each other, naming both.
      NotImplementedError: more than one MTP layer, or one beside an n-gram embedding.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    moe_dim: int
    num_experts: int
    num_experts_per_tok: int
    first_dense_layers: int = 1
    layer_pattern: str = "G"
    window: int | None = None
    attention: AttentionConfig = AttentionConfig()
    experts: ExpertsConfig = ExpertsConfig()
    norm: NormConfig = NormConfig()
    ngram: NGramConfig = NGramConfig()
    num_mtp_layers: int | None = 0
    mtp_kind: str = dataclasses.field(default="G", metadata=LATER)
    """The MTP layer: G is as the last layer, with full attention; L has a window and an MLP, and
    embeds what follows the first token too, as MiMo-V2-Flash's."""
    tie_embeddings: bool = False
    """The head is the embedding."""
    dtype: str = "float32"
    remat: Remat = False
    """Policy of what the backward pass computes again (`layers.remat.POLICIES`)."""
    reproducible_experts: bool = False
    """MoE layers give the same bits on every mesh, slower (`MoE.reproducible`)."""

    def __post_init__(self):
        check_remat(self.remat)
        if not self.layer_pattern or set(self.layer_pattern) - set("GLN"):
            raise ValueError(f"layer_pattern is made of G, L and N; got {self.layer_pattern!r}")
        if self.mtp_kind not in ("G", "L"):
            raise ValueError(f"mtp_kind must be G or L; got {self.mtp_kind!r}")
        if "L" in self.layer_pattern + self.mtp_kind and (self.window is None or self.window < 1):
            raise ValueError(f"a pattern with L needs window >= 1; got window={self.window}")
        for kind in sorted(set(self.layer_pattern)):
            self.heads_of(kind)  # checks them
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                "needs 1 <= num_experts_per_tok <= num_experts; "
                f"got {self.num_experts_per_tok} of {self.num_experts}"
            )
        self.experts.routing.check(self.num_experts, self.num_experts_per_tok)
        if not 0 <= self.first_dense_layers <= self.num_layers:
            raise ValueError(
                "needs 0 <= first_dense_layers <= num_layers; "
                f"got {self.first_dense_layers} of {self.num_layers}"
            )
        if self.num_mtp_layers not in (None, 0, 1):
            raise NotImplementedError(
                "num_mtp_layers must be 0 or 1 (deeper drafts use the one layer again); "
                f"got {self.num_mtp_layers}"
            )
        if self.num_mtp_layers and self.ngram.width > 1:
            raise NotImplementedError(
                f"an MTP layer embeds single tokens; got ngram.width={self.ngram.width}"
            )

    def kind(self, layer: int) -> str:
        """G, L or N. The layer after the last is the MTP layer: `mtp_kind`."""
        if layer >= self.num_layers:
            return self.mtp_kind
        return self.layer_pattern[layer % len(self.layer_pattern)]

    def is_dense(self, layer: int) -> bool:
        """Tell whether a layer has an MLP; the one after the last is the MTP layer."""
        if layer >= self.num_layers and self.mtp_kind == "L":
            return True
        return layer < self.first_dense_layers

    def heads(self, layer: int) -> Heads:
        """The heads of a layer; the one after the last is the MTP layer."""
        return self.heads_of(self.kind(layer) if layer < self.num_layers else "L")

    def heads_of(self, kind: str) -> Heads:
        """The heads of G, L or N layers."""
        if kind != "L" and self.attention.full is not None:
            return self.attention.full
        return Heads(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.attention.value_dim or self.head_dim,
            rope=self.attention.rope,
            sinks=self.attention.sinks,
        )

    @property
    def ngram_width(self) -> int:
        """Tokens that the embedding of one sees."""
        return self.ngram.width
