# SPDX-License-Identifier: Apache-2.0
"""Runs one long conversation: its text beside a fresh prefill, and memory turn by turn."""

import dataclasses
import tracemalloc
from collections.abc import Collection, Iterable, Sequence

import jax
import numpy as np
from rich.progress import track

import jaxcp
from jaxcp.evaluate.agent import Turn, tokens_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Long:
    """Results of a conversation."""

    tokens: int
    same: dict[int, bool]
    """By turn: whether a prefill of all that was said gives the same answer."""
    device: list[int]
    """Bytes of all arrays after each turn."""
    host: list[int]
    """Bytes of Python's and NumPy's objects after each turn."""

    @property
    def slope(self) -> float:
        """Bytes of the host a turn, over the second half of the turns."""
        half = np.array(self.host[len(self.host) // 2 :], float)
        return float(np.polyfit(np.arange(len(half)), half, 1)[0]) if len(half) > 1 else 0.0


def converse(model, tokenizer, trace: Sequence[Turn], checked: Collection[int]) -> Long:
    """Run the turns as one session, then those `checked` again with nothing kept.

    Tracing what is allocated slows the host: seconds of it say nothing.
    """
    engine = jaxcp.Engine(
        model, tokenizer, max_len=tokens_of(trace, tokenizer), max_rows=1, stop_tokens=()
    )
    engine.warm_up()
    session, device, host = engine.session(), [], []
    kept: dict[int, tuple[list[int], list[int]]] = {}
    tracemalloc.start()
    try:
        for number, turn in enumerate(track(trace, "long conversation", transient=True), 1):
            prompt = [*session.tokens, *tokenizer.encode(turn.text).tolist()]
            for _ in session.send(turn.text, max_new_tokens=turn.new_tokens):
                pass
            if number in checked:
                kept[number] = prompt, session.tokens[len(prompt) :]
            del prompt
            device.append(sum(array.nbytes for array in jax.live_arrays()))
            host.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    same = {}
    for number, (prompt, answer) in kept.items():
        engine.scheduler.tree.clear()
        sampling = jaxcp.Sampling(max_new_tokens=len(answer))
        [fresh] = engine.generate([prompt], sampling)
        same[number] = fresh.stats.reused == 0 and fresh.tokens == answer
    return Long(tokens=len(session.tokens), same=same, device=device, host=host)


def rows(long: Long) -> Iterable[tuple[str, ...]]:
    """Lines of MiB after the first turn, the one in the middle, and the last."""
    for name, numbers in (("arrays on devices", long.device), ("objects of the host", long.host)):
        middle = numbers[len(numbers) // 2]
        yield name, *(f"{x / 2**20:,.3f}" for x in (numbers[0], middle, numbers[-1]))
