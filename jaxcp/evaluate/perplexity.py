# SPDX-License-Identifier: Apache-2.0
"""Perplexity of texts, on any checkpoint and mesh: every token once, by windows that overlap.

A window is `context` tokens of one document, the next begins `stride` tokens later and predicts
what the one before did not reach. So a token behind the first window has seen `context - stride`
others and more: with a small stride nearly all of them, with `stride=context` from one on, as in
the evaluation of a training run.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxcp.attention.slots import check_rows
from jaxcp.context_parallel import Ring, Strategy
from jaxcp.context_parallel.overlap import compiler_options
from jaxcp.data.windows import windows
from jaxcp.evaluate.pictures import new_figure
from jaxcp.evaluate.texts import Text
from jaxcp.inference.checks import check_mesh, integer, token_ids
from jaxcp.layers.cross_entropy import token_losses
from jaxcp.models.base import LanguageModel
from pallas_kernels.dispatch import target_platform

NARROWEST = 16
CHUNK = 1024


class Window(NamedTuple):
    """Tokens `start` to `stop` of a text, which predict those from `scored` on, up to `stop`."""

    start: int
    stop: int
    scored: int


class Bucket(NamedTuple):
    """Tokens that were predicted from `least` to `most` others before them."""

    least: int
    most: int
    tokens: int
    nll: float

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nll / self.tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The loss of texts with one length of context."""

    context: int
    stride: int
    bytes: int
    """Bytes of text that were predicted."""
    buckets: tuple[Bucket, ...]
    """All tokens, by how many each was predicted from: one, two to three, four to seven, ..."""
    seen: float
    """Mean number of tokens that one was predicted from."""

    @property
    def tokens(self) -> int:
        """Tokens that were predicted, each once."""
        return sum(bucket.tokens for bucket in self.buckets)

    @property
    def nll(self) -> float:
        """Negative log-likelihood of all of them, in nats."""
        return math.fsum(bucket.nll for bucket in self.buckets)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of `loss`."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits a byte of text, comparable between tokenizers; None where no byte was predicted."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None

    def as_json(self) -> dict[str, Any]:
        """Give all numbers by their names."""
        names = ("context", "stride", "tokens", "bytes", "nll", "loss", "perplexity")
        fields = {name: getattr(self, name) for name in (*names, "bits_per_byte", "seen")}
        buckets = [bucket._asdict() | {"loss": bucket.loss} for bucket in self.buckets]
        return fields | {"by_tokens_seen": buckets}


def evaluate_perplexity(
    model: LanguageModel,
    texts: Sequence[Text],
    *,
    context: int,
    stride: int | None = None,
    rows: int | None = None,
    strategy: Strategy | None = None,
    on_tokens: Callable[[int], Any] | None = None,
) -> Perplexity:
    """Predict every token of the texts (`jaxcp.evaluate.read_texts`) once, on the mesh in scope.

    A token's loss is computed in float32, sums of them in float64.

    Args:
      context: tokens that a window has, at most as many as the model has positions.
      stride: tokens from a window's beginning to that of the next; None takes half of `context`.
      rows: windows that are computed at a time, a multiple of the mesh's `data`, which is the
        default.
      strategy: how queries meet keys of other shards; None is `Ring()`.
      on_tokens: is given the number of tokens that each step has predicted.
    Raises:
      ValueError: an option out of its range, or ids that the model does not have.
      FloatingPointError: a loss is not finite.
    """
    rows = jax.sharding.get_abstract_mesh().shape.get("data", 1) if rows is None else rows
    most = getattr(model.config, "max_positions", np.inf)
    integer("context", context, 1, most, "the model has no more positions" * (most < np.inf))
    stride = max(1, context // 2) if stride is None else stride
    integer("stride", stride, 1, context, "a larger one leaves tokens out")
    check_rows(integer("rows", rows, 1))
    check_mesh(model)
    strategy = Ring() if strategy is None else strategy
    sums = np.zeros((3, context.bit_length()))
    for batch in _batches(texts, context, stride, rows):
        added = _sums(model, batch, strategy, sums.shape[1])
        sums += added
        if on_tokens:
            on_tokens(int(added[0].sum()))
    counts, losses, seen = sums
    return Perplexity(
        context=context,
        stride=stride,
        bytes=sum(text.bytes for text in texts),
        buckets=tuple(
            Bucket(2**i, min(2 ** (i + 1) - 1, context), int(counts[i]), float(losses[i]))
            for i in map(int, np.flatnonzero(counts))
        ),
        seen=float(seen.sum() / counts.sum()),
    )


def windows_of(text: Text, context: int, stride: int) -> Iterator[Window]:
    """Yield the windows of a text: together they predict each token from `text.first` on once."""
    start, scored = 0, text.first
    while scored < len(text.ids):
        stop = min(start + context, len(text.ids) - 1)
        if stop >= scored:
            yield Window(start, stop, scored)
            scored = stop + 1
        start += stride


def _batches(
    texts: Sequence[Text], context: int, stride: int, rows: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches `[rows, T]`: T is a power of two, or `context`, so that programs are few."""
    each = ((text, window) for text in texts for window in windows_of(text, context, stride))
    while chosen := list(itertools.islice(each, rows)):
        longest = max(window.stop - window.start for _, window in chosen)
        width = min(context, max(NARROWEST, 1 << (longest - 1).bit_length()))
        tokens, seen = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.int32)
        targets = np.full((rows, width), -1, np.int64)
        for row, (text, (start, stop, scored)) in enumerate(chosen):
            tokens[row, : stop - start] = text.ids[start:stop]
            targets[row, scored - 1 - start : stop - start] = text.ids[scored : stop + 1]
            seen[row, : stop - start] = np.arange(1, stop - start + 1)
        yield {"tokens": tokens, "targets": targets, "seen": seen}


def _sums(model, batch: dict[str, np.ndarray], strategy: Strategy, buckets: int) -> np.ndarray:
    """Sum tokens, their losses and what they have seen, by bucket: `[3, buckets]`."""
    tokens = token_ids(model, batch["tokens"])
    token_ids(model, np.maximum(batch["targets"], 0))
    layout = strategy.layout
    segments = np.zeros_like(tokens)
    arrays = {
        "tokens": windows(tokens, getattr(model.config, "ngram_width", 1)),
        "targets": batch["targets"].astype(np.int32),
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        "seen": batch["seen"],
    } | ({"segment_ids": segments} if layout.by_segment else {})
    arrays = layout.permute(arrays, jax.sharding.get_abstract_mesh().shape.get("seq", 1))
    seen, real = arrays.pop("seen"), arrays["targets"] >= 0
    length = tokens.shape[1] if getattr(model.config, "recurrent", False) else None
    program = _losses(strategy, not layout.by_segment, target_platform(), length)
    losses = np.asarray(program(model, jax.tree.map(_put, arrays)), np.float64)[real]
    if not np.isfinite(losses).all():
        raise FloatingPointError(
            f"{np.sum(~np.isfinite(losses))} losses are not finite: weights or activations are "
            "NaN, or overflow; look at what `jaxcp.load` logged, or compute in float32"
        )
    at = np.log2(seen[real]).astype(int)
    return np.stack(
        [np.bincount(at, x, buckets) for x in (np.ones_like(losses), losses, seen[real])]
    )


@functools.cache
def _losses(strategy: Strategy, consecutive: bool, platform: str, length: int | None) -> Callable:
    """Make the program that computes the losses `[B, T]` of a batch."""

    def losses(model, batch):
        x, _ = model.hidden(
            batch["tokens"], batch["positions"], segment_ids=batch.get("segment_ids"),
            strategy=strategy, consecutive=consecutive, length=length,
        )  # fmt: skip
        return token_losses(x, model.head_kernel(), batch["targets"], chunk=CHUNK)

    return jax.jit(losses, compiler_options=compiler_options(platform))


def _put(x: np.ndarray) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.asarray(x)
    return jax.device_put(x, P("data", "seq"))


def plot_perplexity(results: Sequence[Perplexity], path: str | pathlib.Path) -> None:
    """Draw the loss by the number of tokens seen before, a line a length of context, as a PNG.

    Raises:
      ImportError: matplotlib is missing, which is an extra.
    """
    figure = new_figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        label = f"context {result.context:,}, stride {result.stride:,}: {result.loss:.4f}"
        places = [bucket.most for bucket in result.buckets]
        axes.plot(places, [x.loss for x in result.buckets], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set(
        xlabel="tokens seen before, up to", ylabel="loss, nats a token", title="Loss by context"
    )
    axes.legend()
    figure.savefig(path, dpi=150)
