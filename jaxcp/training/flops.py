# SPDX-License-Identifier: Apache-2.0
"""FLOPs that a step is worth, whatever it recomputes: products of matrices, and attention.

A product counts 2 FLOPs a weight and token forward and 4 backward: `6 N` a token. N has the head
and the experts that a token meets, and not the embedding, which is no product. Attention counts
`12 heads x head_dim` (the mean of a key's and a value's) for each query and key that sees it; a
causal row of S has S (S + 1) / 2 of these, a window W at most W a query, and documents that are
packed only their own. Latent attention counts as its heads would, with keys and values expanded.

A short convolution counts its taps as weights. The gated delta rule counts what its chunked form
multiplies, in chunks of L = 64 tokens from each document's first on. A head with keys of H channels
and values of V does forward, for l tokens of a chunk (`delta_flops`):

    6 H V l                        reads under keys, reads under queries, and writes of the state
    (2 H + 2 V) l (l + 1) / 2      scores of queries and keys, and what they read
    (4 H + 2 V) l (l - 1) / 2      scores of keys, and the triangular system of both sides

and twice that backward. Decays, gates and norms are no products.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcp.data.batch import Batch
from jaxcp.layers.attention import Attention
from jaxcp.layers.gated_delta import DeltaDims, DeltaLayer
from jaxcp.layers.mla import LatentAttention
from jaxcp.models import abstract_model
from jaxcp.training.muon import sides
from jaxcp.training.step import skeleton
from pallas_kernels import PAD_POSITION, devices

FORWARD_AND_BACKWARD = 3
CHUNK = 64
"""Tokens in which the gated delta rule is counted."""


class Attended(NamedTuple):
    """Layers whose attention has one window (None: none), and the widths of their heads in all."""

    window: int | None
    width: int


@functools.lru_cache(maxsize=8)
def matrix_weights(model_config: Any) -> float:
    """Count the weights that a token is multiplied by."""
    bones = skeleton(model_config)
    total = 0.0
    for name, axes in bones.axes.items():
        plain = axes[axes[:1] == ("layers",) :]
        if len(sides(axes)[1]) < 2:
            continue
        size = math.prod(bones.shapes[name])
        if plain[:1] == ("experts",):
            size *= model_config.num_experts_per_tok / model_config.num_experts
        total += size
    if getattr(model_config, "tie_embeddings", False):
        total += model_config.vocab_size * model_config.embed_dim
    for layer, count in delta_layers(model_config):
        d = layer.dims
        channels = 2 * d.num_key_heads * d.key_dim + d.num_value_heads * d.value_dim
        total += count * d.taps * channels
    return total


@functools.lru_cache(maxsize=8)
def attended(model_config: Any) -> tuple[Attended, ...] | None:
    """List the attention of a model by window; None where it has a kind that is not counted."""
    widths: dict[int | None, int] = {}
    for attention, count in abstract_model(model_config).attentions().values():
        if isinstance(attention, DeltaLayer):
            continue
        if isinstance(attention, LatentAttention) and attention.index is None:
            dims, window = attention.dims, None
            heads, value = attention.kv_up.shape[-2], dims.value_dim
            key = dims.nope_dim + dims.rope_dim
        elif isinstance(attention, Attention):
            window, value = attention.window, attention.value_dim
            heads, key = attention.q.shape[-2:]
        else:
            return None
        widths[window] = widths.get(window, 0) + count * heads * (key + value) // 2
    return tuple(Attended(window, width) for window, width in widths.items())


@functools.lru_cache(maxsize=8)
def delta_layers(model_config: Any) -> tuple[tuple[DeltaLayer, int], ...]:
    """List the layers of a model that go by the gated delta rule: one of each stack, how many."""
    stacks = abstract_model(model_config).attentions().values()
    return tuple((layer, count) for layer, count in stacks if isinstance(layer, DeltaLayer))


def flops_of(model_config: Any, batch: Batch) -> float | None:
    """FLOPs of a training step on a batch `[B, T]` in natural order; None where not known."""
    layers = attended(model_config)
    if layers is None:
        return None
    lengths = document_lengths(batch)
    total = 2 * FORWARD_AND_BACKWARD * matrix_weights(model_config) * lengths.sum()
    for window, width in layers:
        total += 4 * FORWARD_AND_BACKWARD * width * visible_pairs(lengths, window)
    for layer, count in delta_layers(model_config):
        total += FORWARD_AND_BACKWARD * count * delta_flops(lengths, layer.dims)
    return float(total)


def delta_flops(lengths: np.ndarray, dims: DeltaDims) -> int:
    """FLOPs of a layer's gated delta rule forward, over documents of these lengths."""
    lengths = lengths.astype(np.int64)
    rest = lengths % CHUNK
    pairs = (lengths // CHUNK * (CHUNK * (CHUNK + 1) // 2) + rest * (rest + 1) // 2).sum()
    tokens = lengths.sum()
    heads, key, value = dims.num_value_heads, dims.key_dim, dims.value_dim
    of_pairs = (2 * key + 2 * value) * pairs + (4 * key + 2 * value) * (pairs - tokens)
    return int(heads * (6 * key * value * tokens + of_pairs))


def document_lengths(batch: Batch) -> np.ndarray:
    """Count the tokens of each document of each row, pads left out."""
    real = batch["positions"] != PAD_POSITION
    if "segment_ids" not in batch:
        return real.sum(1)
    row = np.broadcast_to(np.arange(len(real))[:, None], real.shape)
    keys = row.astype(np.int64) << 32 | batch["segment_ids"].astype(np.uint32)
    return np.unique(keys[real], return_counts=True)[1]


def visible_pairs(lengths: np.ndarray, window: int | None) -> int:
    """Count the pairs of a query and a key that it sees, over documents of these lengths."""
    lengths = lengths.astype(np.int64)
    whole = lengths if window is None else np.minimum(lengths, window)
    return int((whole * (whole + 1) // 2 + (lengths - whole) * whole).sum())


def mask_of(model_config: Any, batch: Batch) -> str:
    """Name what the counted FLOPs of attention leave out: causal, window, packed."""
    layers = attended(model_config) or ()
    parts = ["causal"] + ["window"] * any(layer.window is not None for layer in layers)
    return "+".join([*parts, *["packed"] * ("segment_ids" in batch)])


def peak_of(mesh: jax.sharding.Mesh) -> float | None:
    """Peak bfloat16 FLOPs a second of all devices of a mesh; None for one that is not known."""
    chip = devices.find(mesh.devices.flat[0].device_kind)
    return None if chip is None else chip.bf16_flops_per_device * mesh.size
