# SPDX-License-Identifier: Apache-2.0
"""Tensors of Qwen3-Next and Qwen3.5.

Qwen3-Next joins what projects to queries, keys, values and gates, for one key head after another;
Qwen3.5 lays them side by side or apart. Axes: as in `decoder_rows`, `w` the taps of a convolution,
and `p c` embedding and state, which the MTP layer joins. A Qwen3.5 that sees pictures has its text
part under `model.language_model`.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping

from jaxcp.models.decoder_rows import (
    EXPERTS,
    GATED_MLP,
    KEYS_AND_OUTPUT,
    MODEL,
    NORMS,
    ROUTER,
    in_layer,
)
from jaxcp.models.qwen3_next.config import Qwen3NextConfig
from jaxcp.models.weight_table import Row

log = logging.getLogger(__name__)

COPIES = {"lm_head.weight": "embed"}
MTP_PREFIX = "mtp."
SEEING = "model.visual.", "visual."
"""Layers that see pictures."""
MTP = (
    Row("mtp.pre_fc_norm_embedding.weight", "d", "mtp.embed_norm.scale", "d"),
    Row("mtp.pre_fc_norm_hidden.weight", "d", "mtp.hidden_norm.scale", "d"),
    Row("mtp.fc.weight", "d (p c)", "mtp.join", "p c d"),
    Row("mtp.norm.weight", "d", "mtp.final_norm.scale", "d"),
)


def _delta(name: str, axes: str, paths: str | tuple[str, ...], leaf_axes: str, **options) -> Row:
    paths = (paths,) if isinstance(paths, str) else paths
    paths = tuple(f"attention.{path}" for path in paths)
    return in_layer(f"linear_attn.{name}", axes, paths, leaf_axes, **options)


DELTA = (
    _delta("conv1d.weight", "(n h) 1 w", ("query_taps", "key_taps", "value_taps"), "w n h"),
    _delta("A_log", "n", "log_rate", "n"),
    _delta("dt_bias", "n", "decay_bias", "n"),
    _delta("norm.weight", "h", "norm.scale", "h"),
    _delta("out_proj.weight", "d (n h)", "out", "n h d"),
)
APART = (
    _delta("in_proj_qkv.weight", "(n h) d", ("query", "key", "value"), "d n h"),
    _delta("in_proj_z.weight", "(n h) d", "z", "d n h"),
    _delta("in_proj_b.weight", "n d", "beta", "d n"),
    _delta("in_proj_a.weight", "n d", "decay", "d n"),
)
SHARED = (
    in_layer("mlp.shared_expert.gate_proj.weight", "f d", "mlp.shared.gate", "d f"),
    in_layer("mlp.shared_expert.up_proj.weight", "f d", "mlp.shared.up", "d f"),
    in_layer("mlp.shared_expert.down_proj.weight", "d f", "mlp.shared.down", "f d"),
    in_layer("mlp.shared_expert_gate.weight", "1 d", "mlp.shared_gate", "d"),
)


def _joined(key_heads: int) -> tuple[Row, ...]:
    """The tensors that Qwen3-Next joins, a key head after another."""
    parts = "query", "key", "value", "z"
    return (
        _delta("in_proj_qkvz.weight", "(n h) d", parts, "d n h", turns=key_heads),
        _delta("in_proj_ba.weight", "n d", ("beta", "decay"), "d n", turns=key_heads),
    )


def _queries(heads: int) -> tuple[Row, ...]:
    """A head's query, then its gate."""
    both, biases = ("attention.q", "attention.gate"), ("attention.q_bias", "attention.gate_bias")
    return (
        in_layer("self_attn.q_proj.weight", "(n h) d", both, "d n h", turns=heads),
        in_layer("self_attn.q_proj.bias", "(n h)", biases, "n h", turns=heads),
    )


@functools.lru_cache(maxsize=8)
def table(config: Qwen3NextConfig) -> tuple[Row, ...]:
    """Every tensor of a model of this configuration."""
    delta = _joined(config.delta.num_key_heads) if config.format == "qwen3_next" else APART
    attention = *KEYS_AND_OUTPUT, *_queries(config.num_heads)
    block = *NORMS, *attention, *GATED_MLP, ROUTER, *EXPERTS, *SHARED
    mtp = (*MTP, *map(_of_mtp, block)) if config.num_mtp_layers else ()
    return (*map(_under_either_name, (*MODEL, *DELTA, *delta, *block)), *mtp)


def _of_mtp(row: Row) -> Row:
    names = tuple(name.replace("model.layers.{i}.", "mtp.layers.0.") for name in row.all_names)
    paths = tuple(path.replace("layers.{i}.", "mtp.block.") for path in row.all_paths)
    return dataclasses.replace(row, names=names, paths=paths)


def _under_either_name(row: Row) -> Row:
    nested = (name.replace("model.", "model.language_model.", 1) for name in row.all_names)
    return dataclasses.replace(row, names=tuple(dict.fromkeys((*row.all_names, *nested))))


def copies(config: Qwen3NextConfig) -> Mapping[str, str]:
    """`COPIES`, where the head is tied."""
    return COPIES if config.tie_embeddings else {}


def fit(config: Qwen3NextConfig, names: Collection[str]) -> Qwen3NextConfig:
    """The configuration of what a checkpoint with these tensors holds.

    transformers drops the MTP layer; the config.json of Qwen3-Next is silent on it.
    """
    there = any(name.startswith(MTP_PREFIX) for name in names)
    if config.num_mtp_layers is None and there:
        return dataclasses.replace(config, num_mtp_layers=1)
    if config.num_mtp_layers and not there:
        log.info("config.json speaks of an MTP layer; the checkpoint has none, and is read so")
        return dataclasses.replace(config, num_mtp_layers=0)
    return config


def left_out(names: Collection[str], config: Qwen3NextConfig) -> frozenset[str]:
    """Tensors of layers that see pictures, and of an MTP layer that config.json says is not one."""
    unread = SEEING if config.num_mtp_layers else (*SEEING, MTP_PREFIX)
    return frozenset(name for name in names if name.startswith(unread))
