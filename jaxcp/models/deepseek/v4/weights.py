# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4's tensors: the hub's names, then those transformers writes, then those it has inside.

Axes: `v` vocabulary, `d` embed, `q` the queries' latent, `n` heads (of a group), `h` head, `g` out
groups, `r` their middle, `c` compressed width, `p` places in a block, `i` index heads, `f` expert
width, `e` experts, `m` mixing weights, `s` streams times embed. A torch Linear stores `[out, in]`.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping

from jaxcp.models.deepseek.v4.config import DeepSeekV4Config
from jaxcp.models.weight_table import Row

log = logging.getLogger(__name__)


def _layer(
    name: str,
    axes: str,
    path: str,
    leaf_axes: str,
    inside: str | None = None,
    written: str | None = None,
    stored_as: str | None = None,
) -> Row:
    names = [f"layers.{{i}}.{name}", f"model.layers.{{i}}.{written or name}"]
    names += [] if inside is None else [f"model.layers.{{i}}.{inside}"]
    return Row(tuple(names), axes, f"layers.{{i}}.{path}", leaf_axes, stored_as=stored_as)


def _linear(hub: str, axes: str, path: str, leaf_axes: str, inside: str) -> Row:
    return _layer(f"{hub}.weight", axes, path, leaf_axes, f"{inside}.weight")


def _compressor(hub: str, path: str, inside: str) -> tuple[Row, ...]:
    return (
        _linear(f"{hub}.wkv", "c d", f"{path}.value", "d c", f"{inside}.kv_proj"),
        _linear(f"{hub}.wgate", "c d", f"{path}.gate", "d c", f"{inside}.gate_proj"),
        _layer(f"{hub}.ape", "p c", f"{path}.bias", "p c", f"{inside}.position_bias"),
        _linear(f"{hub}.norm", "c", f"{path}.norm.scale", "c", f"{inside}.kv_norm"),
    )


def _streams(site: str, path: str) -> tuple[Row, ...]:
    return (
        _layer(f"hc_{site}_fn", "m s", f"{path}.mix", "m s", f"{site}_hc.fn"),
        _layer(f"hc_{site}_base", "m", f"{path}.base", "m", f"{site}_hc.base"),
        _layer(f"hc_{site}_scale", "m", f"{path}.scale", "m", f"{site}_hc.scale"),
    )


def _mlp(kind: str, path: str, axes: str, leaf_axes: str) -> tuple[Row, ...]:
    hub = {"gate": "w1", "up": "w3", "down": "w2"}[kind]
    name = f"{kind}_proj.weight"
    return (
        _layer(f"ffn.experts.{{e}}.{hub}.weight", axes, f"mlp.{kind}", f"e {leaf_axes}",
               f"mlp.experts.{{e}}.{name}"),
        _layer(f"ffn.shared_experts.{hub}.weight", axes, f"mlp.shared.{kind}", leaf_axes,
               f"mlp.shared_experts.{name}"),
    )  # fmt: skip


def _fused(name: str, axes: str, kinds: tuple[str, ...], leaf_axes: str, join: int = 0) -> Row:
    paths = tuple(f"layers.{{i}}.mlp.{kind}" for kind in kinds)
    return Row(f"model.layers.{{i}}.mlp.experts.{name}", axes, paths, leaf_axes, join)


TABLE = (
    Row(("embed.weight", "model.embed_tokens.weight"), "v d", "embed", "v d"),
    *_streams("attn", "attention_streams"),
    _linear("attn_norm", "d", "attention_norm.scale", "d", "input_layernorm"),
    _linear("attn.wq_a", "q d", "attention.q_down", "d q", "self_attn.q_a_proj"),
    _linear("attn.q_norm", "q", "attention.q_norm.scale", "q", "self_attn.q_a_norm"),
    _linear("attn.wq_b", "(n h) q", "attention.q_up", "q n h", "self_attn.q_b_proj"),
    _linear("attn.wkv", "h d", "attention.kv", "d h", "self_attn.kv_proj"),
    _layer("attn.kv_norm.weight", "h", "attention.kv_norm.scale", "h",
           "self_attn.kv_norm.weight", "attn.norm.weight"),
    _layer("attn.attn_sink", "n", "attention.sinks", "n", "self_attn.sinks"),
    _linear("attn.wo_a", "(g r) (n h)", "attention.o_down", "g n h r", "self_attn.o_a_proj"),
    _linear("attn.wo_b", "d (g r)", "attention.o_up", "g r d", "self_attn.o_b_proj"),
    *_compressor("attn.compressor", "attention.compressor", "self_attn.compressor"),
    *_compressor("attn.indexer.compressor", "attention.index.compressor",
                 "self_attn.compressor.indexer"),
    _linear("attn.indexer.wq_b", "(i c) q", "attention.index.q", "q i c",
            "self_attn.compressor.indexer.q_b_proj"),
    _linear("attn.indexer.weights_proj", "i d", "attention.index.weights", "d i",
            "self_attn.compressor.indexer.scorer.weights_proj"),
    *_streams("ffn", "mlp_streams"),
    _linear("ffn_norm", "d", "mlp_norm.scale", "d", "post_attention_layernorm"),
    _linear("ffn.gate", "e d", "mlp.router", "d e", "mlp.gate"),
    _layer("ffn.gate.bias", "e", "mlp.router_bias", "e", "mlp.gate.e_score_correction_bias"),
    _layer("ffn.gate.tid2eid", "v e", "experts_of_token", "v e", "mlp.gate.tid2eid",
           stored_as="int64"),
    *_mlp("gate", "mlp.gate", "f d", "d f"),
    *_mlp("up", "mlp.up", "f d", "d f"),
    *_mlp("down", "mlp.down", "d f", "f d"),
    _fused("gate_up_proj", "e f d", ("gate", "up"), "e d f", join=1),
    _fused("down_proj", "e d f", ("down",), "e f d"),
    Row(("hc_head_fn", "model.hc_head.hc_fn"), "m s", "streams_to_one.mix", "m s"),
    Row(("hc_head_base", "model.hc_head.hc_base"), "m", "streams_to_one.base", "m"),
    Row(("hc_head_scale", "model.hc_head.hc_scale"), "m", "streams_to_one.scale", "m"),
    Row(("norm.weight", "model.norm.weight"), "d", "final_norm.scale", "d"),
    Row(("head.weight", "lm_head.weight"), "v d", "lm_head", "d v"),
)  # fmt: skip

COPIES: Mapping[str, str] = {}


MTP = (
    Row("mtp.0.enorm.weight", "d", "mtp.embed_norm.scale", "d"),
    Row("mtp.0.hnorm.weight", "d", "mtp.hidden_norm.scale", "d"),
    Row("mtp.0.e_proj.weight", "d c", "mtp.from_embed", "c d"),
    Row("mtp.0.h_proj.weight", "d c", "mtp.from_hidden", "c d"),
    Row("mtp.0.hc_head_fn", "m s", "mtp.streams_to_one.mix", "m s"),
    Row("mtp.0.hc_head_base", "m", "mtp.streams_to_one.base", "m"),
    Row("mtp.0.hc_head_scale", "m", "mtp.streams_to_one.scale", "m"),
    Row("mtp.0.norm.weight", "d", "mtp.final_norm.scale", "d"),
)


def table(config: DeepSeekV4Config) -> tuple[Row, ...]:
    """Every tensor of a model of this configuration."""
    return (*TABLE, *MTP_TABLE) if config.num_mtp_layers else TABLE


def _mtp(row: Row) -> Row:
    """A layer's row, of the layer that drafts: transformers has none, so the hub's name alone."""
    name, path = row.all_names[0], row.all_paths[0]
    names = (name.replace("layers.{i}.", "mtp.0."),)
    return dataclasses.replace(row, names=names, paths=(path.replace("layers.{i}.", "mtp.block."),))


MTP_TABLE = (*MTP, *(_mtp(row) for row in TABLE if row.all_names[0].startswith("layers.{i}.")))


def fit(config: DeepSeekV4Config, names: Collection[str]) -> DeepSeekV4Config:
    """The configuration of what a checkpoint with these tensors holds.

    transformers drops the MTP layer and goes on saying that there is one.
    """
    if config.num_mtp_layers and not any(n.startswith("mtp.") for n in names):
        log.info("config.json speaks of an MTP layer; the checkpoint has none, and is read so")
        return dataclasses.replace(config, num_mtp_layers=0)
    return config


def left_out(names: Collection[str], config: DeepSeekV4Config) -> frozenset[str]:
    """An MTP layer that config.json does not speak of."""
    if config.num_mtp_layers:
        return frozenset()
    return frozenset(name for name in names if name.startswith("mtp."))
