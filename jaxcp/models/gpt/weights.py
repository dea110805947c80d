# SPDX-License-Identifier: Apache-2.0
"""GPT-2's tensors. Its Conv1D stores `[in, out]`; q, k and v lie side by side in `c_attn`.

Axes: `v` vocabulary, `p` positions, `d` embed, `n` heads, `h` head, `f` mlp.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxcp.models.weight_table import Row


def _row(name: str, axes: str, paths: str | tuple[str, ...], leaf_axes: str, join: int = 0) -> Row:
    # openai-community/gpt2 leaves out the prefix that everything since then has
    return Row((f"transformer.{name}", name), axes, paths, leaf_axes, join)


_QKV = ("layers.{i}.attention.q", "layers.{i}.attention.k", "layers.{i}.attention.v")
_QKV_BIAS = tuple(f"{path}_bias" for path in _QKV)

TABLE = (
    _row("wte.weight", "v d", "embed", "v d"),
    _row("wpe.weight", "p d", "position_embed", "p d"),
    _row("h.{i}.ln_1.weight", "d", "layers.{i}.attention_norm.scale", "d"),
    _row("h.{i}.ln_1.bias", "d", "layers.{i}.attention_norm.bias", "d"),
    _row("h.{i}.attn.c_attn.weight", "d (n h)", _QKV, "d n h", join=1),
    _row("h.{i}.attn.c_attn.bias", "(n h)", _QKV_BIAS, "n h"),
    _row("h.{i}.attn.c_proj.weight", "(n h) d", "layers.{i}.attention.o", "n h d"),
    _row("h.{i}.attn.c_proj.bias", "d", "layers.{i}.attention.o_bias", "d"),
    _row("h.{i}.ln_2.weight", "d", "layers.{i}.mlp_norm.scale", "d"),
    _row("h.{i}.ln_2.bias", "d", "layers.{i}.mlp_norm.bias", "d"),
    _row("h.{i}.mlp.c_fc.weight", "d f", "layers.{i}.mlp.up", "d f"),
    _row("h.{i}.mlp.c_fc.bias", "f", "layers.{i}.mlp.up_bias", "f"),
    _row("h.{i}.mlp.c_proj.weight", "f d", "layers.{i}.mlp.down", "f d"),
    _row("h.{i}.mlp.c_proj.bias", "d", "layers.{i}.mlp.down_bias", "d"),
    _row("ln_f.weight", "d", "final_norm.scale", "d"),
    _row("ln_f.bias", "d", "final_norm.bias", "d"),
    Row("lm_head.weight", "v d", "lm_head", "d v"),  # where it is not tied
)

# Tensors that repeat a leaf: they may be there, and then must be equal to it.
COPIES = {"lm_head.weight": "embed"}


def copies(config: Any) -> Mapping[str, str]:
    """`COPIES`, where the head is tied."""
    return COPIES if config.tie_embeddings else {}


def left_out(names: Collection[str], config: Any) -> frozenset[str]:
    """Names that are no weights: causal masks that old checkpoints carry along."""
    mask = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
    return frozenset(filter(mask.fullmatch, names))
