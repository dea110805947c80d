# SPDX-License-Identifier: Apache-2.0
"""An agent's turns, on any checkpoint: what each computes, what it finds computed, its seconds.

A turn appends what a tool said and asks for an answer; nothing that was said changes afterwards.
So a turn should compute its own tokens and no others, however long the conversation has become.
"""

import dataclasses
import os
import pathlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxcp.data.haystack import corpus
from jaxcp.evaluate.pictures import new_figure
from jaxcp.inference import Engine, Session
from jaxcp.inference.checks import integer
from jaxcp.input_files import read_json
from jaxcp.models.base import LanguageModel
from jaxcp.text.tokenizer import Tokenizer

TURNS = 495
"""Steps of the longest run of an agent that is reported of Hy3."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """A text to append, and how many tokens to ask for then.

    Raises:
      ValueError: no text, or fewer than one token.
    """

    text: str
    new_tokens: int

    def __post_init__(self):
        if not isinstance(self.text, str) or not self.text:
            raise ValueError(f"the text of a turn must not be empty; got {self.text!r:.100}")
        integer("new_tokens", self.new_tokens, 1)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Numbers and answer of a turn that was run."""

    prefilled: int
    """Tokens it computed before its first one: its text, and the last of the answer before."""
    reused: int
    """Tokens it found in the pool."""
    generated: int
    drafted: int
    accepted: int
    """Guesses that were right, of those `drafted`."""
    first_token_seconds: float
    seconds: float
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """A trace, and how each of its turns went."""

    trace: tuple[Turn, ...]
    measured: tuple[Measured, ...]

    def totals(self) -> Measured:
        """Add up the numbers of all turns, and put the answers one behind the other."""
        numbers = [field.name for field in dataclasses.fields(Measured) if field.name != "answer"]
        sums = {name: sum(getattr(turn, name) for turn in self.measured) for name in numbers}
        return Measured(**sums, answer="".join(turn.answer for turn in self.measured))

    @property
    def reused_share(self) -> float:
        """Part of the tokens before first ones that was found and not computed."""
        all_turns = self.totals()
        return all_turns.reused / (all_turns.reused + all_turns.prefilled)

    def as_json(self) -> dict[str, Any]:
        """Give what `read_trace` reads, and beside it the numbers of each turn."""
        return {
            "trace": [dataclasses.asdict(turn) for turn in self.trace],
            "measured": [dataclasses.asdict(turn) for turn in self.measured],
        }


def make_trace(
    turns: int = TURNS,
    *,
    outputs: Sequence[int] = (100, 400, 100),
    new_tokens: int = 16,
    system: int = 2_000,
    seed: int = 0,
) -> tuple[Turn, ...]:
    """Make the turns of an agent whose tool reads CPython's documentation.

    Args:
      outputs: characters of the tool's outputs, turn by turn; after the last size comes the first.
      system: characters of the prompt that stands before the first output.
      seed: of the places that the tool reads.
    Raises:
      ValueError: a size that is none, or no sizes.
    """
    integer("turns", turns, 1)
    integer("system", system, 0)
    if not outputs:
        raise ValueError("outputs needs one size or more")
    for size in outputs:
        integer("a size of outputs", size, 1)
    text, place = corpus().decode(), random.Random(seed)

    def read(size: int) -> str:
        repeated = text * (1 + size // len(text))
        begin = place.randrange(len(repeated) - size + 1)
        return repeated[begin : begin + size]

    before = read(system) if system else ""
    texts = [read(outputs[turn % len(outputs)]) for turn in range(turns)]
    texts[0] = before + texts[0]
    return tuple(Turn(text=text, new_tokens=new_tokens) for text in texts)


def read_trace(file: str | os.PathLike) -> tuple[Turn, ...]:
    """Read a trace: `{"trace": [{"text": "...", "new_tokens": 16}, ...]}`.

    Other keys, such as the numbers of the run that wrote it, change nothing.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no JSON, or no trace; the message names the turn.
    """
    turns = read_json(file).get("trace")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f'needed "trace", a list of turns; {file} has {type(turns).__name__}')
    names = {field.name for field in dataclasses.fields(Turn)}
    found = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or turn.keys() != names:
            raise ValueError(f"turn {number} of {file} needs {sorted(names)}; got {turn!r:.100}")
        try:
            found.append(Turn(**turn))
        except ValueError as error:
            raise ValueError(f"turn {number} of {file}: {error}") from error
    return tuple(found)


def tokens_of(trace: Sequence[Turn], tokenizer: Tokenizer) -> int:
    """Tokens that a conversation of these turns may come to hold."""
    return sum(len(tokenizer.encode(turn.text)) + turn.new_tokens for turn in trace)


def evaluate_agent(
    model: LanguageModel,
    tokenizer: Tokenizer,
    trace: Sequence[Turn],
    *,
    on_turn: Callable[[Measured], None] | None = None,
    **options: Any,
) -> Result:
    """Run the turns as one conversation, on the mesh in scope. Answers are greedy.

    Programs are compiled before the first turn.

    Args:
      options: those of `Engine`, such as `drafts` and `cache_dtype`.
    Raises:
      ValueError, NotImplementedError: no turns, or what `Engine` says of the model and its options.
    """
    if not trace:
        raise ValueError("the trace has no turns")
    options = {"max_len": tokens_of(trace, tokenizer), "max_rows": 1} | options
    engine = Engine(model, tokenizer, **options)
    engine.warm_up()
    session, measured = engine.session(plain=True), []
    for turn in trace:
        measured.append(take_turn(session, turn))
        if on_turn:
            on_turn(measured[-1])
    return Result(trace=tuple(trace), measured=tuple(measured))


def take_turn(session: Session, turn: Turn) -> Measured:
    """Send a turn and read its answer to the end."""
    start = time.perf_counter()
    answer = "".join(session.send(turn.text, max_new_tokens=turn.new_tokens))
    seconds, stats = time.perf_counter() - start, session.stats
    return Measured(
        prefilled=stats.prefilled,
        reused=stats.reused,
        generated=stats.generated,
        drafted=stats.drafted,
        accepted=stats.accepted,
        first_token_seconds=stats.prefill_seconds,
        seconds=seconds,
        answer=answer,
    )


def plot_turns(result: Result, path: str | pathlib.Path) -> None:
    """Draw the seconds of each turn, and those to its first token, as a PNG.

    Raises:
      ImportError: matplotlib is missing, which is an extra.
    """
    turns = range(1, len(result.measured) + 1)
    figure = new_figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("seconds", "whole turn"), ("first_token_seconds", "to its first token")):
        axes.plot(turns, [getattr(turn, name) for turn in result.measured], label=label)
    axes.set(xlabel="turn", ylabel="seconds", title="Seconds a turn", ylim=(0, None))
    held = [turn.reused + turn.prefilled + turn.generated for turn in result.measured]
    other = axes.twinx()
    other.plot(turns, held, color="gray", linestyle=":", label="tokens in the conversation")
    other.set(ylabel="tokens", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
