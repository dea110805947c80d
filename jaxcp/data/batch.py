# SPDX-License-Identifier: Apache-2.0
"""Defines a batch, and checks a source's batch before any of it is cast."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from pallas_kernels import PAD_POSITION

Batch = dict[str, np.ndarray]
"""`[B, T]` each: int32 `tokens`, `targets` (-1: none), `positions`, float32 `weights` of the
targets, and int32 `segment_ids` where documents are packed. A source may give any integers;
`checked` narrows them."""

LEAVES = ("tokens", "targets", "positions", "segment_ids", "weights")


def checked(
    batch: Batch,
    vocab_size: int,
    *,
    max_positions: int | None = None,
    locate: Callable[[int, int], str] | None = None,
) -> Batch:
    """Check a batch, fill in its optional leaves, then cast to int32 and float32.

    Args:
      max_positions: positions that the model has; None for no limit.
      locate: says where the token at `(row, place)` was read, as `TokenFiles.locate` does.
    Raises:
      ValueError: a leaf missing or unknown, shapes that differ, anything but integers, a token or
        position that the model does not have (on a device such an index is clamped silently), or
        positions that do not ascend within a segment (tokens would see later ones).
    """
    arrays = _arrays(batch)
    weights = _weights(arrays.pop("weights", None), arrays["targets"])
    for name, x in arrays.items():
        if not np.issubdtype(x.dtype, np.integer):
            raise ValueError(f"{name} must be integers; got {x.dtype}")
    _check_ids(arrays, vocab_size, locate)
    for name, x in arrays.items():
        _check_int32(name, x)
    out = {name: x.astype(np.int32) for name, x in arrays.items()}
    _check_positions(out["positions"], max_positions, weights)
    _check_ascending(out["positions"], out.get("segment_ids"))
    return out | {"weights": weights}


def consecutive(batch: Batch) -> bool:
    """Tell whether tokens of a segment lie one after the other, with positions that say so."""
    positions = batch["positions"]
    segments = batch.get("segment_ids", np.zeros_like(positions))
    step, same = np.diff(positions), np.diff(segments)
    return bool(((same > 0) | ((same == 0) & (step == 1))).all())


def _arrays(batch: Batch) -> dict[str, np.ndarray]:
    """Take the leaves as NumPy arrays `[B, T]` of any dtype, and fill in positions."""
    if not isinstance(batch, Mapping) or not {"tokens", "targets"} <= batch.keys() <= set(LEAVES):
        got = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"a batch needs tokens and targets and may have {LEAVES}; got {got}")
    arrays = {name: np.asarray(batch[name]) for name in LEAVES if name in batch}
    tokens = arrays["tokens"]
    if "positions" not in arrays and tokens.ndim == 2:
        arrays["positions"] = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    shapes = {name: x.shape for name, x in arrays.items()}
    if len(set(shapes.values())) != 1 or tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"all leaves of a batch must be [B, T] alike, not empty; got {shapes}")
    return arrays


def _weights(weights: np.ndarray | None, targets: np.ndarray) -> np.ndarray:
    """Cast weights to float32, with 0 for targets below 0, which are none."""
    if weights is None:
        return (targets >= 0).astype(np.float32)
    if not (weights.dtype.kind in "biu" or jnp.issubdtype(weights.dtype, jnp.floating)):
        raise ValueError(f"weights must be real numbers; got {weights.dtype}")
    with np.errstate(over="ignore"):
        narrow = weights.astype(np.float32)
    if (np.isinf(narrow) & (weights != narrow)).any():
        raise ValueError("weights must fit float32; got larger ones")
    return np.where(targets >= 0, narrow, np.float32(0))


def _check_ids(
    arrays: Mapping[str, np.ndarray], vocab_size: int, locate: Callable[[int, int], str] | None
) -> None:
    for shift, name in enumerate(("tokens", "targets")):
        ids = arrays[name]
        outside = ids >= vocab_size
        if name == "tokens":
            outside = outside | (ids < 0)
        if not outside.any():
            continue
        row, place = (int(x) for x in np.argwhere(outside)[0])
        at = f"row {row}, place {place}"
        if locate is not None:
            at += f": {locate(row, place + shift)}"  # a target is the token one place on
        if ids[row, place] < 0:
            raise ValueError(f"tokens must be >= 0; got {ids[row, place]} ({at})")
        raise ValueError(
            f"{name} hold id {ids[row, place]}, but the vocabulary has {vocab_size} ({at}): "
            "raise vocab_size, or the data is of another tokenizer or dtype"
        )


def _check_int32(name: str, x: np.ndarray) -> None:
    low, high = int(x.min()), int(x.max())
    limits = np.iinfo(np.int32)
    if low < limits.min or high > limits.max:
        raise ValueError(f"{name} must fit int32; got {low} to {high}: number them from 0")


def _check_positions(positions, max_positions: int | None, weights: np.ndarray) -> None:
    if positions.min() < 0:
        raise ValueError(f"positions must be >= 0; got {positions.min()}")
    pads = positions == PAD_POSITION
    if (weights[pads] != 0).any():
        raise ValueError("pads (PAD_POSITION) see nothing: give them targets of -1 or weights of 0")
    last = np.where(pads, -1, positions).max()
    if max_positions is not None and last >= max_positions:
        raise ValueError(f"the model has {max_positions} positions; got position {last}")


def _check_ascending(positions: np.ndarray, segment_ids: np.ndarray | None) -> None:
    """Raise ValueError unless positions `[B, T]` ascend along a row, or within its segments.

    Positions are the mask: where they start anew, or stay, and no segment says so, a token sees
    others that come after it. Pads may lie anywhere.
    """
    pads = positions == PAD_POSITION
    segments = np.zeros_like(positions) if segment_ids is None else segment_ids
    segments = np.where(pads, np.iinfo(np.int64).min, segments.astype(np.int64))
    order = np.argsort(segments, axis=1, kind="stable")  # within a segment as in the row
    segments, positions, pads = (
        np.take_along_axis(x, order, 1) for x in (segments, positions, pads)
    )
    falls = (positions[:, 1:] <= positions[:, :-1]) & ~pads[:, 1:]
    wrong = np.argwhere(falls & (segments[:, 1:] == segments[:, :-1]))
    if not wrong.size:
        return
    row, place = wrong[0]
    before, after = positions[row, place : place + 2]
    advice = (
        "give segment_ids [B, T], a number for each document"
        if segment_ids is None
        else f"segment {segments[row, place]} must be one document, in natural order"
    )
    raise ValueError(
        f"positions must ascend, or tokens see later ones; row {row} has {before} and then "
        f"{after} at place {order[row, place + 1]}: {advice}"
    )
