# SPDX-License-Identifier: Apache-2.0
"""Commands that talk with a checkpoint: `generate` and `chat`."""

import dataclasses
import hashlib
import pathlib
import sys
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

from tyro.conf import OmitArgPrefixes

from jaxcp.checkpoints import NEEDLE
from jaxcp.cli.devices import ONE_DEVICE, Devices, loaded
from jaxcp.cli.several import ALONE, Processes, one_of
from jaxcp.cli.terminal import (
    at_least_one,
    read_lines,
    read_prompt,
    talks_with_a_person,
    thinking_level,
)

NEW_TOKENS, CHAT_NEW_TOKENS = 256, 128
CHAT_TOKENS = 32_768


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of sampling; the default of most is what generation_config.json says, or greedy."""

    max_new_tokens: int | None = None
    """Default: 256 (chat: 128, or 4,096 by a template), or as many as there is room for."""
    temperature: float | None = None
    """0: greedy."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    ignore_eos: bool = False
    """Go on where the checkpoint's eos_token_id would end an answer."""

    @property
    def stop_tokens(self) -> tuple[int, ...] | None:
        return () if self.ignore_eos else None

    def options(self, defaults) -> dict[str, Any]:
        """Give what was said of sampling, and of the rest what `defaults` say."""
        advised = dataclasses.asdict(defaults)
        given = {name: getattr(self, name) for name in advised}
        chosen = {name: advised[name] if x is None else x for name, x in given.items()}
        return {name: x for name, x in chosen.items() if x is not None}


GREEDY = Sampling()


def generate(
    *,
    prompt: str | None = None,
    prompt_file: pathlib.Path | None = None,
    checkpoint: pathlib.Path = NEEDLE,
    max_len: int | None = None,
    devices: OmitArgPrefixes[Devices] = ONE_DEVICE,
    sampling: OmitArgPrefixes[Sampling] = GREEDY,
    several: OmitArgPrefixes[Processes] = ALONE,
) -> None:
    """Continue a text: the prompt's, a file's, or what is piped in.

    Args:
        prompt: the text, or what follows the text of the file; -: standard input.
        prompt_file: a UTF-8 file; -: standard input.
        checkpoint: folder with config.json, *.safetensors and tokenizer.json.
        max_len: tokens that fit, prompt and answer; default: just enough.
        devices: how the devices are used.
        sampling: how tokens are chosen.
        several: processes that share the model; each is given the same prompt, the first answers.
    """
    _check(max_len, sampling)
    text = read_prompt(prompt, prompt_file)
    with one_of(several, devices.count), loaded(checkpoint, devices) as (model, tokenizer):
        from jaxcp.inference import Engine
        from jaxcp.processes import is_first

        tokens = len(tokenizer.begin) + len(tokenizer.encode(text))
        if max_len is None:
            limit = _positions(model, tokens + (sampling.max_new_tokens or NEW_TOKENS))
            if tokens > limit:
                raise ValueError(f"the prompt has {tokens:,} tokens; the model takes {limit:,}")
            max_len = limit
        engine = Engine(model, tokenizer, max_len=max_len, stop_tokens=sampling.stop_tokens)
        session = engine.session(seed=sampling.seed, plain=True)
        pieces = _send(session, _of_all(text), sampling)
        if is_first():
            _show(session, pieces)
        else:
            deque(pieces, maxlen=0)


def _of_all(text: str) -> str:
    """The prompt, where all processes were given the same."""
    from jaxcp.processes import gather

    digests = gather(hashlib.sha256(text.encode()).hexdigest())
    if len({*digests}) > 1:
        raise ValueError("each process must be given the same prompt; got others")
    return text


def chat(
    *,
    checkpoint: pathlib.Path = NEEDLE,
    thinking: str | None = None,
    system: str | None = None,
    max_len: int | None = None,
    devices: OmitArgPrefixes[Devices] = ONE_DEVICE,
    sampling: OmitArgPrefixes[Sampling] = GREEDY,
) -> None:
    """Talk turn by turn; each turn prefills only itself. An empty line or end of file ends it.

    Turns go by the checkpoint's chat template where it has one. At a terminal /help names commands;
    in a pipe a line is a turn, and what comes out is the answers.

    Args:
        checkpoint: folder with config.json, *.safetensors and tokenizer.json.
        thinking: a level of the chat template (no_think, low, high, ...), or a number of tokens.
        system: what the model is told before all else.
        max_len: tokens that the conversation may hold; default: 32,768, or as many as the model
            has positions.
        devices: how the devices are used.
        sampling: how tokens are chosen.
    """
    _check(max_len, sampling)
    with loaded(checkpoint, devices) as (model, tokenizer):
        from jaxcp.inference import Engine

        if max_len is None:
            max_len = _positions(model, CHAT_TOKENS)
        engine = Engine(model, tokenizer, max_len=max_len, stop_tokens=sampling.stop_tokens)
        level = thinking_level(thinking)
        session = engine.session(seed=sampling.seed, thinking=level, system=system)
        if talks_with_a_person():
            _converse(session, sampling)
            return
        for text in read_lines():
            try:
                _show(session, _send(session, text, sampling, CHAT_NEW_TOKENS), end="\n")
            except ValueError as error:
                print(f"! {error}", file=sys.stderr)


def _check(max_len: int | None, sampling: Sampling) -> None:
    """Refuse what nothing could honour before a model is loaded."""
    at_least_one(max_len=max_len, max_new_tokens=sampling.max_new_tokens)
    if not 0 <= sampling.seed < 2**32:  # jax would drop the higher bits
        raise ValueError(f"--seed must be in 0..{2**32 - 1}; got {sampling.seed}")


def _positions(model, at_most: int) -> int:
    """The positions of the model, or `at_most`, whichever is less."""
    return min(at_most, getattr(model.config, "max_positions", at_most))


def _send(
    session, text: str, sampling: Sampling, default: int = NEW_TOKENS, **options: Any
) -> Generator[str, None, None]:
    """Begin an answer, as long as was asked for or as there is room."""
    tokenizer, count = session.engine.tokenizer, sampling.max_new_tokens
    options |= sampling.options(tokenizer.defaults)
    if sampling.ignore_eos:
        options["stop_tokens"] = ()
    if count is not None:
        options["max_new_tokens"] = count
    if hasattr(session, "messages"):
        return session.send(text, **options)
    ids = tokenizer.encode(text).tolist()
    ids = ids if session.tokens else [*tokenizer.begin, *ids]
    room = session.engine.max_len - len(session.tokens) - len(ids) + 1
    return session.send(ids, **({"max_new_tokens": max(1, min(default, room))} | options))


def _show(session, pieces: Iterator[str], end: str = "") -> None:
    """Print an answer as it comes, and what it took on standard error."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print(end=end, flush=True)
    stats = session.stats
    lost = f", {stats.lost:,} lost" if stats.lost else ""
    print(
        "\n" * (not end) + f"[{stats.prefilled:,} tokens prefilled "
        f"in {stats.prefill_seconds:.2f} s, "
        f"{stats.reused:,} reused{lost}; "
        f"{stats.generated} generated, {stats.decode_tokens_per_second:.1f} a second; "
        f"{stats.cache_bytes_per_device / 2**20:.1f} MiB of cache a device]",
        file=sys.stderr,
    )


def _converse(session, sampling: Sampling) -> None:
    from rich.console import Console

    from jaxcp.cli.conversation import Conversation

    def send(session, text: str) -> Generator[str, None, None]:
        thoughts = {"reasoning": True} if hasattr(session, "messages") else {}
        return _send(session, text, sampling, CHAT_NEW_TOKENS, **thoughts)

    Conversation(session, send, Console()).run()
