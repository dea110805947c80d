# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3's and V3.2's tensors; the fused experts are those of transformers in memory.

Axes: `v` vocabulary, `d` embed, `q` and `l` the latents (`l` with the rotated key part where it is
projected), `n` heads, `h` head, `i` index heads, `c` index head, `f` mlp or expert width,
`e` experts. A torch Linear stores `[out, in]`.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping

from jaxcp.models.deepseek.v3.config import DeepSeekV3Config
from jaxcp.models.weight_table import Row

log = logging.getLogger(__name__)


def _layer(name: str, axes: str, paths: str | tuple[str, ...], leaf_axes: str, join=0) -> Row:
    paths = (paths,) if isinstance(paths, str) else paths
    paths = tuple(f"layers.{{i}}.{path}" for path in paths)
    return Row(f"model.layers.{{i}}.{name}", axes, paths, leaf_axes, join)


TABLE = (
    Row("model.embed_tokens.weight", "v d", "embed", "v d"),
    _layer("input_layernorm.weight", "d", "attention_norm.scale", "d"),
    _layer("self_attn.q_a_proj.weight", "q d", "attention.q_down", "d q"),
    _layer("self_attn.q_a_layernorm.weight", "q", "attention.q_norm.scale", "q"),
    _layer("self_attn.q_b_proj.weight", "(n h) q", "attention.q_up", "q n h"),
    _layer("self_attn.kv_a_proj_with_mqa.weight", "l d", "attention.kv_down", "d l"),
    _layer("self_attn.kv_a_layernorm.weight", "l", "attention.kv_norm.scale", "l"),
    _layer("self_attn.kv_b_proj.weight", "(n h) l", "attention.kv_up", "l n h"),
    _layer("self_attn.o_proj.weight", "d (n h)", "attention.o", "n h d"),
    # the index of V3.2
    _layer("self_attn.indexer.wq_b.weight", "(i c) q", "attention.index.q", "q i c"),
    _layer("self_attn.indexer.wk.weight", "c d", "attention.index.k", "d c"),
    _layer("self_attn.indexer.k_norm.weight", "c", "attention.index.k_norm.scale", "c"),
    _layer("self_attn.indexer.k_norm.bias", "c", "attention.index.k_norm.bias", "c"),
    _layer("self_attn.indexer.weights_proj.weight", "i d", "attention.index.weights", "d i"),
    _layer("post_attention_layernorm.weight", "d", "mlp_norm.scale", "d"),
    # dense layers
    _layer("mlp.gate_proj.weight", "f d", "mlp.gate", "d f"),
    _layer("mlp.up_proj.weight", "f d", "mlp.up", "d f"),
    _layer("mlp.down_proj.weight", "d f", "mlp.down", "f d"),
    # mixture-of-experts layers
    _layer("mlp.gate.weight", "e d", "mlp.router", "d e"),
    _layer("mlp.gate.e_score_correction_bias", "e", "mlp.router_bias", "e"),
    _layer("mlp.experts.{e}.gate_proj.weight", "f d", "mlp.gate", "e d f"),
    _layer("mlp.experts.{e}.up_proj.weight", "f d", "mlp.up", "e d f"),
    _layer("mlp.experts.{e}.down_proj.weight", "d f", "mlp.down", "e f d"),
    _layer("mlp.experts.gate_up_proj", "e f d", ("mlp.gate", "mlp.up"), "e d f", join=1),
    _layer("mlp.experts.down_proj", "e d f", "mlp.down", "e f d"),
    _layer("mlp.shared_experts.gate_proj.weight", "f d", "mlp.shared.gate", "d f"),
    _layer("mlp.shared_experts.up_proj.weight", "f d", "mlp.shared.up", "d f"),
    _layer("mlp.shared_experts.down_proj.weight", "d f", "mlp.shared.down", "f d"),
    Row("model.norm.weight", "d", "final_norm.scale", "d"),
    Row("lm_head.weight", "v d", "lm_head", "d v"),
)

COPIES: Mapping[str, str] = {}


MTP = (
    _layer("enorm.weight", "d", "embed_norm.scale", "d"),
    _layer("hnorm.weight", "d", "hidden_norm.scale", "d"),
    _layer("eh_proj.weight", "d (p c)", "join", "p c d"),
    _layer("shared_head.norm.weight", "d", "final_norm.scale", "d"),
)


@functools.lru_cache(maxsize=8)
def table(config: DeepSeekV3Config) -> tuple[Row, ...]:
    """Every tensor of a model of this configuration."""
    if not config.num_mtp_layers:
        return TABLE
    block = (row for row in TABLE if row.all_names[0].startswith("model.layers."))
    rows = (
        *(_at(row, config, "mtp.") for row in MTP),
        *(_at(r, config, "mtp.block.") for r in block),
    )
    return (*TABLE, *rows)


def copies(config: DeepSeekV3Config) -> Mapping[str, str]:
    """Tensors that the MTP layer has again, beside the leaf that they are: read, and written."""
    if not config.num_mtp_layers:
        return {}
    after = _after(config)
    return {f"{after}embed_tokens.weight": "embed", f"{after}shared_head.head.weight": "lm_head"}


def fit(config: DeepSeekV3Config, names: Collection[str]) -> DeepSeekV3Config:
    """The configuration of what a checkpoint with these tensors holds.

    transformers drops the MTP layer and goes on saying that there is one.
    """
    if config.num_mtp_layers and not any(n.startswith(_after(config)) for n in names):
        log.info("config.json speaks of an MTP layer; the checkpoint has none, and is read so")
        return dataclasses.replace(config, num_mtp_layers=0)
    return config


def left_out(names: Collection[str], config: DeepSeekV3Config) -> frozenset[str]:
    """An MTP layer that config.json does not speak of."""
    prefix = _after(config)
    # Without this projection it is an ordinary layer, num_layers is wrong, and that must show.
    if config.num_mtp_layers or f"{prefix}eh_proj.weight" not in names:
        return frozenset()
    return frozenset(name for name in names if name.startswith(prefix))


def _at(row: Row, config: DeepSeekV3Config, path: str) -> Row:
    """A row of the layer after the last."""
    names = tuple(name.replace("{i}", str(config.num_layers)) for name in row.all_names)
    paths = tuple(p.replace("layers.{i}.", path) for p in row.all_paths)
    return dataclasses.replace(row, names=names, paths=paths)


def _after(config: DeepSeekV3Config) -> str:
    return f"model.layers.{config.num_layers}."
