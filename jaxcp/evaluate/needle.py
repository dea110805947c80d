# SPDX-License-Identifier: Apache-2.0
"""Needle in a haystack, on any checkpoint: exact match by context length and depth.

A haystack is prefilled once; its questions are turns of one conversation, so each prefills only
itself. Answers are greedy. A question is the beginning of its needle's line, letter for letter,
and half of the keys differ from another key in a single digit.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxcp.data.haystack import DIGITS, QUESTION, Haystack, make_haystack
from jaxcp.evaluate.pictures import new_figure
from jaxcp.inference import Engine, Session
from jaxcp.models.base import LanguageModel
from jaxcp.text.tokenizer import Tokenizer

DEPTH_BINS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One question and its answer. `depth` is the place of the needle, from 0 (first byte) to 1."""

    length: int
    depth: float
    key: int
    expected: str
    answered: str

    @property
    def correct(self) -> bool:
        return self.answered == self.expected


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """One haystack: bytes of text, tokens and seconds of the first turn, cost of later turns."""

    length: int
    tokens: int
    prefill_seconds: float
    cache_bytes_per_device: int
    later_prefilled: int
    """Tokens that the last question prefilled."""
    reused: int
    """Tokens of the last question that were in the cache."""
    decode_tokens_per_second: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    answers: tuple[Answer, ...]
    reads: tuple[Read, ...]

    def lengths(self) -> list[int]:
        return sorted({a.length for a in self.answers})

    def accuracy(self, length: int | None = None) -> float:
        """Fraction of exact answers, of one length or of all."""
        return float(np.mean([a.correct for a in self.answers if length in (None, a.length)]))

    def as_json(self) -> dict:
        return {
            "accuracy": {str(n): self.accuracy(n) for n in self.lengths()},
            "answers": [dataclasses.asdict(a) for a in self.answers],
            "reads": [dataclasses.asdict(r) for r in self.reads],
        }


def evaluate_needle(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int] = (2_048, 8_192, 32_768),
    needles: int = 20,
    haystacks: int = 1,
    strategy=None,
    seed: int = 0,
    on_answer: Callable[[Answer], None] | None = None,
) -> Result:
    """Ask for every needle of `haystacks` haystacks a length (bytes of text), on the mesh in scope.

    Raises:
      ValueError: the needles do not fit a length, or the text does not fit the model's positions.
    """
    answers, reads = [], []
    for length in lengths:
        for number in range(haystacks):
            haystack = make_haystack(length, needles, seed=seed + number)
            engine = Engine(
                model, tokenizer, max_len=_tokens(haystack, tokenizer), strategy=strategy
            )
            session = engine.session(plain=True)
            first = None
            for answer in ask(session, haystack, length):
                first = first or dataclasses.replace(session.stats)
                answers.append(answer)
                if on_answer:
                    on_answer(answer)
            assert first is not None
            last = session.stats
            reads.append(
                Read(
                    length=length,
                    tokens=first.prefilled,
                    prefill_seconds=first.prefill_seconds,
                    cache_bytes_per_device=last.cache_bytes_per_device,
                    later_prefilled=last.prefilled,
                    reused=last.reused,
                    decode_tokens_per_second=last.decode_tokens_per_second,
                )
            )
    return Result(answers=tuple(answers), reads=tuple(reads))


def ask(session: Session, haystack: Haystack, length: int) -> Iterable[Answer]:
    """Send the haystack with its first question, then each other question as a turn of its own."""
    tokenizer = session.engine.tokenizer
    assert tokenizer is not None
    digits = len(tokenizer.encode("0" * DIGITS))
    before = haystack.text
    for key, value, depth in zip(haystack.keys, haystack.values, haystack.depths, strict=True):
        answered = "".join(session.send(before + QUESTION.format(key=key), max_new_tokens=digits))
        before = "]\n"  # ends the line that the answer was part of
        yield Answer(
            length=length,
            depth=depth,
            key=key,
            expected=f"{value:0{DIGITS}d}",
            answered=answered[:DIGITS],
        )


def _tokens(haystack: Haystack, tokenizer: Tokenizer) -> int:
    turn = len(tokenizer.encode("]\n" + QUESTION.format(key=0) + "0" * DIGITS)) + 2
    return len(tokenizer.encode(haystack.text)) + turn * len(haystack.keys)


def plot_heat_map(result: Result, path: str | pathlib.Path) -> None:
    """Draw exact match by context length and depth as a PNG.

    Raises:
      ImportError: matplotlib is missing, which is an extra.
    """
    lengths = result.lengths()
    grid = np.full((DEPTH_BINS, len(lengths)), np.nan)
    for column, length in enumerate(lengths):
        for row in range(DEPTH_BINS):
            hits = [
                a.correct
                for a in result.answers
                if a.length == length and int(a.depth * DEPTH_BINS) == row
            ]
            grid[row, column] = 100 * np.mean(hits) if hits else np.nan
    figure = new_figure(figsize=(2.4 + 1.1 * len(lengths), 4.2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(
        range(len(lengths)), [f"{n:,}\n{100 * result.accuracy(n):.1f} %" for n in lengths]
    )
    axes.set_yticks(range(DEPTH_BINS), [f"{10 * r}-{10 * r + 10} %" for r in range(DEPTH_BINS)])
    axes.set(
        xlabel="context, bytes (exact match below)",
        ylabel="depth of the needle",
        title="Needles found",
    )
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            ink = "black" if 15 < value < 85 else "white"  # the ends of the colours are dark
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(image, label="exact match, %")
    figure.savefig(path, dpi=150)
