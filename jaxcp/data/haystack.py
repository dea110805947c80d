# SPDX-License-Identifier: Apache-2.0
"""Needles in real text: `\\n[key 4831 is 902714]\\n` among near-identical distractors.

The text is CPython's documentation (`pydoc_data.topics`, 465 KB of English). Both the evaluation
and the run that trains the shipped checkpoint take the form of a needle from here.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np

QUESTION = "\n[key {key:04d} is "
"""The question at the end of a haystack; the six digits of the answer follow."""
NEEDLE = QUESTION + "{value:06d}]\n"
DIGITS = 6
HELD_OUT = 0.1  # the end of the text, which training does not see


@functools.cache
def corpus() -> bytes:
    """CPython's documentation topics, sorted by name."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Haystack:
    """`text` (ASCII) holds each needle once; ask `QUESTION.format(key=keys[i])` for `values[i]`."""

    text: str
    keys: tuple[int, ...]
    values: tuple[int, ...]
    depths: tuple[float, ...]
    """The start of each needle, as a fraction of the text."""


def make_haystack(length: int, needles: int, seed: int) -> Haystack:
    """Hide `needles` needles at evenly spread depths in real text, `length` bytes in all.

    Half of the keys differ from another one in a single digit.

    Raises:
      ValueError: the needles do not fit.
    """
    size = len(NEEDLE.format(key=0, value=0))
    if needles < 1 or needles * size * 2 > length:
        raise ValueError(
            f"{needles} needles of {size} bytes need at least {max(needles, 1) * size * 2} bytes; "
            f"got {length}"
        )
    rng = np.random.default_rng((seed, length, needles))
    keys: list[int] = []
    while len(keys) < needles:
        keys.append(_new_key(rng, keys, similar=len(keys) % 2 == 1))
    order = rng.permutation(needles)
    values = rng.integers(0, 10**DIGITS, needles)
    text = _circular_text(rng, length - needles * size)
    cuts = np.linspace(0, len(text), needles + 1).astype(int)
    places = [int(rng.integers(a, b)) for a, b in itertools.pairwise(cuts)]
    pieces, begins, last = [], [], 0
    for place, i in zip(places, order, strict=True):
        pieces.append(text[last:place])
        begins.append(sum(map(len, pieces)))
        pieces.append(NEEDLE.format(key=keys[i], value=int(values[i])).encode())
        last = place
    whole = b"".join([*pieces, text[last:]])
    return Haystack(
        text=whole.decode("ascii", "replace"), keys=tuple(keys[i] for i in order),
        values=tuple(int(values[i]) for i in order), depths=tuple(b / length for b in begins),
    )  # fmt: skip


def _circular_text(rng: np.random.Generator, length: int) -> bytes:
    text = corpus().decode("utf-8", "replace").encode("ascii", "replace")
    start = int(rng.integers(len(text)))
    repeated = text * (2 + length // len(text))
    return repeated[start : start + length]


def _new_key(rng: np.random.Generator, keys: list[int], *, similar: bool) -> int:
    """Draw a key that is not in `keys`; a `similar` one is one of them with one digit changed."""
    while True:
        key = int(rng.integers(10_000))
        if similar and keys:
            digits = list(f"{keys[int(rng.integers(len(keys)))]:04d}")
            digits[int(rng.integers(4))] = str(int(rng.integers(10)))
            key = int("".join(digits))
        if key not in keys:
            return key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """The documents from step `start` on: their bytes, and the bytes of text between two needles.

    `spacing`: bounds of the latter, which are drawn log-uniformly.
    """

    start: int = 0
    document_length: int = 256
    spacing: tuple[int, int] = (26, 300)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleSource:
    """Training rows: documents of real text with needle lines, most of which repeat an earlier one.

    A row packs `length / document_length` documents, told apart by segment ids. Loss weights:
    the first digit of a repeated value 2 (only the key tells it), the others 1, text `text_weight`,
    the line's frame 0.1, and 0 for digits that nothing before tells.
    """

    stages: tuple[Stage, ...] = (Stage(),)
    """Stages in order of `start`; the first starts at 0."""
    seed: int = 0
    repeat: float = 0.6
    """Chance that a line repeats an earlier key and its value."""
    similar: float = 0.3
    """Chance that a new key differs from an old one in one digit only."""
    text_weight: float = 0.3
    """Loss weight of a byte of text; a digit that an earlier line tells weighs 1."""

    def __post_init__(self):
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"stages must start at 0 and ascend; they start at {starts}")

    def stage(self, step: int) -> "Stage":
        return next(stage for stage in reversed(self.stages) if step >= stage.start)

    def batch(self, step: int, rows: int, length: int) -> dict[str, np.ndarray]:
        """The batch of a step, a pure function of it; every leaf is `[rows, length]`."""
        stage = self.stage(step)
        size = min(stage.document_length, length)
        count = -(-length // size)
        rng = np.random.default_rng((self.seed, step))
        documents = [self._document(rng, size + 1, stage.spacing) for _ in range(rows * count)]
        tokens = np.stack([d for d, _ in documents])
        weights = np.stack([w for _, w in documents])

        def rows_of(x):
            return np.ascontiguousarray(x.reshape(rows, count * size)[:, :length])

        segments = np.repeat(np.arange(count, dtype=np.int32), size)[:length]
        return {
            "tokens": rows_of(tokens[:, :-1]),
            "targets": rows_of(tokens[:, 1:]),
            "weights": rows_of(weights[:, 1:]),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
            "segment_ids": np.broadcast_to(segments, (rows, length)),
        }

    def _document(
        self, rng: np.random.Generator, size: int, spacing
    ) -> tuple[np.ndarray, np.ndarray]:
        """Make a document of `size` bytes, and the loss weight of each."""
        text = corpus()
        text = text[: int(len(text) * (1 - HELD_OUT))]
        start = int(rng.integers(len(text) - size))
        low, high = map(math.log, spacing)
        pieces: list[bytes] = []
        weights: list[np.ndarray] = []
        known: dict[int, int] = {}
        total = 0
        while total < size:
            gap = int(math.exp(rng.uniform(low, high)))
            pieces.append(text[start : start + gap])
            start = (start + gap) % (len(text) - 400)
            weights.append(np.full(len(pieces[-1]), self.text_weight, np.float32))
            again = bool(known) and rng.random() < self.repeat
            if again:
                key = list(known)[int(rng.integers(len(known)))]
            else:
                key = _new_key(rng, list(known), similar=rng.random() < self.similar)
                known[key] = int(rng.integers(10**DIGITS))
            pieces.append(NEEDLE.format(key=key, value=known[key]).encode())
            weights.append(_needle_weights(again))
            total = sum(map(len, pieces))
        data = np.frombuffer(b"".join(pieces), np.uint8)[:size].astype(np.int32)
        return data, np.concatenate(weights)[:size]


def _needle_weights(again: bool) -> np.ndarray:
    line = NEEDLE.format(key=0, value=0)
    weights = np.full(len(line), 0.1, np.float32)
    key_at, value_at = line.index("0"), line.index("0" * DIGITS)
    weights[key_at : key_at + 4] = 0.0
    weights[value_at : value_at + DIGITS] = (2.0, 1.0, 1.0, 1.0, 1.0, 1.0) if again else 0.0
    return weights
