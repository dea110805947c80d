# SPDX-License-Identifier: Apache-2.0
"""The tensors of an MTP layer that lies as the layer after the last: Hy3, DeepSeek-V3, GLM-4.5;
and of MiMo-V2-Flash's, the first of its own."""

import dataclasses
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from jaxcp.models.decoder_rows import LAYER, in_layer
from jaxcp.models.weight_table import Row

log = logging.getLogger(__name__)

JOINED = (
    in_layer("enorm.weight", "d", "embed_norm.scale", "d"),
    in_layer("hnorm.weight", "d", "hidden_norm.scale", "d"),
    in_layer("eh_proj.weight", "d (p c)", "join", "p c d"),
)
SHARED_HEAD_NORM = in_layer("shared_head.norm.weight", "d", "final_norm.scale", "d")
FINAL_NORM = in_layer("final_layernorm.weight", "d", "final_norm.scale", "d")


def mtp_rows(
    config: Any, final_norm: Row, block: Iterable[Row], prefix: str | None = None
) -> Iterator[Row]:
    """Rows of the MTP layer, of whose block an ordinary layer has the rows `block`; none without
    one. Names begin with `prefix`, by default that of the layer after the last."""
    if not config.num_mtp_layers:
        return
    for rows, path in (((*JOINED, final_norm), "mtp."), (block, "mtp.block.")):
        for row in rows:
            if row.all_names[0].startswith(LAYER):
                yield _renamed(row, prefix or _prefix(config), path)


def copies_of_mtp(config: Any) -> Mapping[str, str]:
    """Tensors that the layer of DeepSeek-V3 has again, beside the leaf that they are: read, and
    written."""
    if not config.num_mtp_layers:
        return {}
    after, head = (
        _prefix(config),
        "embed" if getattr(config, "tie_embeddings", False) else "lm_head",
    )
    return {f"{after}embed_tokens.weight": "embed", f"{after}shared_head.head.weight": head}


def fit(config: Any, names: Collection[str]) -> Any:
    """The configuration of what a checkpoint with these tensors holds.

    transformers drops the MTP layer and goes on saying that there is one.
    """
    if config.num_mtp_layers and not any(n.startswith(_prefix(config)) for n in names):
        log.info("config.json speaks of an MTP layer; the checkpoint has none, and is read so")
        return dataclasses.replace(config, num_mtp_layers=0)
    return config


def left_out(names: Collection[str], config: Any) -> frozenset[str]:
    """An MTP layer that config.json does not speak of."""
    prefix = _prefix(config)
    # Without this projection it is an ordinary layer, num_layers is wrong, and that must show.
    if config.num_mtp_layers or f"{prefix}eh_proj.weight" not in names:
        return frozenset()
    return frozenset(name for name in names if name.startswith(prefix))


def _renamed(row: Row, prefix: str, path: str) -> Row:
    names = tuple(name.replace(f"{LAYER}.", prefix) for name in row.all_names)
    paths = tuple(p.replace("layers.{i}.", path) for p in row.all_paths)
    return dataclasses.replace(row, names=names, paths=paths)


def _prefix(config: Any) -> str:
    return f"model.layers.{config.num_layers}."
