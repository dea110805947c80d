# SPDX-License-Identifier: Apache-2.0
"""Tensors of Kimi Linear, as the hub has them.

Axes: as in `decoder_rows`, `r` a latent and `w` the taps of a convolution.
"""

from collections.abc import Collection, Mapping

from jaxcp.models.decoder_rows import MODEL, NORMS, OUTPUT, in_layer
from jaxcp.models.kimi_linear.config import KimiLinearConfig
from jaxcp.models.weight_table import Row

COPIES = {"lm_head.weight": "embed"}


def _attention(name: str, axes: str, path: str, leaf_axes: str) -> Row:
    return in_layer(f"self_attn.{name}", axes, f"attention.{path}", leaf_axes)


def _sparse(name: str, axes: str, path: str, leaf_axes: str) -> Row:
    return in_layer(f"block_sparse_moe.{name}", axes, f"mlp.{path}", leaf_axes)


def _dense(name: str, axes: str, path: str, leaf_axes: str) -> Row:
    """transformers writes the MLP of a dense layer under the name of the experts."""
    names = f"mlp.{name}", f"block_sparse_moe.{name}"
    return in_layer(names, axes, f"mlp.{path}", leaf_axes)


DELTA = (
    _attention("q_proj.weight", "(n h) d", "query", "d n h"),
    _attention("k_proj.weight", "(n h) d", "key", "d n h"),
    _attention("v_proj.weight", "(n h) d", "value", "d n h"),
    _attention("q_conv1d.weight", "(n h) 1 w", "query_taps", "w n h"),
    _attention("k_conv1d.weight", "(n h) 1 w", "key_taps", "w n h"),
    _attention("v_conv1d.weight", "(n h) 1 w", "value_taps", "w n h"),
    _attention("b_proj.weight", "n d", "beta", "d n"),
    _attention("f_a_proj.weight", "r d", "decay_down", "d r"),
    _attention("f_b_proj.weight", "(n h) r", "decay_up", "r n h"),
    _attention("dt_bias", "(n h)", "decay_bias", "n h"),
    _attention("A_log", "1 1 n 1", "log_rate", "n"),
    _attention("g_a_proj.weight", "r d", "z_down", "d r"),
    _attention("g_b_proj.weight", "(n h) r", "z_up", "r n h"),
    _attention("o_norm.weight", "h", "norm.scale", "h"),
    _attention("o_proj.weight", "d (n h)", "out", "n h d"),
)
LATENT = (
    _attention("q_proj.weight", "(n h) d", "q", "d n h"),
    _attention("q_a_proj.weight", "r d", "q_down", "d r"),
    _attention("q_a_layernorm.weight", "r", "q_norm.scale", "r"),
    _attention("q_b_proj.weight", "(n h) r", "q_up", "r n h"),
    _attention("kv_a_proj_with_mqa.weight", "r d", "kv_down", "d r"),
    _attention("kv_a_layernorm.weight", "r", "kv_norm.scale", "r"),
    _attention("kv_b_proj.weight", "(n h) r", "kv_up", "r n h"),
    OUTPUT,
)
DENSE = (
    _dense("gate_proj.weight", "f d", "gate", "d f"),
    _dense("up_proj.weight", "f d", "up", "d f"),
    _dense("down_proj.weight", "d f", "down", "f d"),
)
SPARSE = (
    _sparse("gate.weight", "e d", "router", "d e"),
    _sparse("gate.e_score_correction_bias", "e", "router_bias", "e"),
    _sparse("experts.{e}.w1.weight", "f d", "gate", "e d f"),
    _sparse("experts.{e}.w3.weight", "f d", "up", "e d f"),
    _sparse("experts.{e}.w2.weight", "d f", "down", "e f d"),
    _sparse("shared_experts.gate_proj.weight", "f d", "shared.gate", "d f"),
    _sparse("shared_experts.up_proj.weight", "f d", "shared.up", "d f"),
    _sparse("shared_experts.down_proj.weight", "d f", "shared.down", "f d"),
)
TABLE = (*MODEL, *NORMS, *DELTA, *LATENT, *DENSE, *SPARSE)


def copies(config: KimiLinearConfig) -> Mapping[str, str]:
    """`COPIES`, where the head is tied."""
    return COPIES if config.tie_embeddings else {}


def left_out(names: Collection[str], config: KimiLinearConfig) -> frozenset[str]:
    """None: published checkpoints have the model alone."""
    del names, config
    return frozenset()
