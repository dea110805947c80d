# SPDX-License-Identifier: Apache-2.0
"""The configuration of a dense model: Llama, Mistral, Qwen2, Qwen3."""

import dataclasses

from jaxcp.layers.remat import Remat, check_remat
from jaxcp.layers.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """`layer_pattern` is cycled over the layers.

    G: full attention, L: a sliding window. `window` counts tokens, a token's own included. `dtype`
    is that of the computation.

    Raises:
      ValueError: sizes that contradict each other, naming both.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    layer_pattern: str = "G"
    window: int | None = None
    rope: Rope = dataclasses.field(default_factory=Rope)
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    """Attention's output projection has a bias."""
    mlp_bias: bool = False
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    """The head is the embedding."""
    trained_positions: int | None = None
    """The length that config.json says the model was trained for; limits nothing here."""
    dtype: str = "float32"
    remat: Remat = False
    """Policy of what the backward pass computes again (`layers.remat.POLICIES`)."""

    def __post_init__(self):
        check_remat(self.remat)
        if not self.layer_pattern or set(self.layer_pattern) - set("GL"):
            raise ValueError(f"layer_pattern is made of G and L; got {self.layer_pattern!r}")
        if "L" in self.layer_pattern and (self.window is None or self.window < 1):
            raise ValueError(f"a pattern with L needs window >= 1; got window={self.window}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads; got {self.num_kv_heads} and {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions; got {self.head_dim}")

    def kind(self, layer: int) -> str:
        """G or L."""
        return self.layer_pattern[layer % len(self.layer_pattern)]
