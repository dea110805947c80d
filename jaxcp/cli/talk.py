# SPDX-License-Identifier: Apache-2.0
"""Commands that talk with a checkpoint: `generate` and `chat`."""

import dataclasses
import pathlib
import sys

from tyro.conf import OmitArgPrefixes

from jaxcp.checkpoints import NEEDLE
from jaxcp.cli.devices import ONE_DEVICE, Devices, loaded
from jaxcp.cli.terminal import at_least_one, read_lines, read_prompt

NEW_TOKENS, CHAT_NEW_TOKENS = 256, 128
CHAT_TOKENS = 32_768


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of sampling. Greedy unless the temperature is positive."""

    max_new_tokens: int | None = None
    """Default: 256 (chat: 128), or as many as there is room for."""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    """Go on where the checkpoint's eos_token_id would end an answer."""

    @property
    def stop_tokens(self) -> tuple[int, ...] | None:
        return () if self.ignore_eos else None


GREEDY = Sampling()


def generate(
    *,
    prompt: str | None = None,
    prompt_file: pathlib.Path | None = None,
    checkpoint: pathlib.Path = NEEDLE,
    max_len: int | None = None,
    devices: OmitArgPrefixes[Devices] = ONE_DEVICE,
    sampling: OmitArgPrefixes[Sampling] = GREEDY,
) -> None:
    """Continue a text: the prompt's, a file's, or what is piped in.

    Args:
        prompt: the text, or what follows the text of the file; -: standard input.
        prompt_file: a UTF-8 file; -: standard input.
        checkpoint: folder with config.json, *.safetensors and tokenizer.json.
        max_len: tokens that fit, prompt and answer; default: just enough.
        devices: how the devices are used.
        sampling: how tokens are chosen.
    """
    _check(max_len, sampling)
    text = read_prompt(prompt, prompt_file)
    with loaded(checkpoint, devices) as (model, tokenizer):
        from jaxcp.inference import Engine

        tokens = len(tokenizer.encode(text))
        if max_len is None:
            limit = _positions(model, tokens + (sampling.max_new_tokens or NEW_TOKENS))
            if tokens > limit:
                raise ValueError(f"the prompt has {tokens:,} tokens; the model takes {limit:,}")
            max_len = limit
        engine = Engine(model, tokenizer, max_len=max_len, stop_tokens=sampling.stop_tokens)
        session = engine.session(seed=sampling.seed)
        _answer(session, text, sampling)


def chat(
    *,
    checkpoint: pathlib.Path = NEEDLE,
    max_len: int | None = None,
    devices: OmitArgPrefixes[Devices] = ONE_DEVICE,
    sampling: OmitArgPrefixes[Sampling] = GREEDY,
) -> None:
    """Talk turn by turn; each turn prefills only itself. An empty line or end of file ends it.

    Args:
        checkpoint: folder with config.json, *.safetensors and tokenizer.json.
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
        session = engine.session(seed=sampling.seed)
        for text in read_lines():
            try:
                _answer(session, text, sampling, CHAT_NEW_TOKENS)
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


def _answer(session, text: str, sampling: Sampling, default: int = NEW_TOKENS) -> None:
    count = sampling.max_new_tokens
    if count is None:
        answered = session.stats.turns > 0  # its last token is not in the cache yet
        used = session.stats.tokens + answered + len(session.engine.tokenizer.encode(text))
        count = max(1, min(default, session.engine.max_len - used + 1))
    for piece in session.send(
        text, max_new_tokens=count, temperature=sampling.temperature,
        top_k=sampling.top_k, top_p=sampling.top_p,
    ):  # fmt: skip
        print(piece, end="", flush=True)
    stats = session.stats
    print(
        f"\n[{stats.prefilled:,} tokens prefilled in {stats.prefill_seconds:.2f} s, "
        f"{stats.reused:,} reused; "
        f"{stats.generated} generated, {stats.decode_tokens_per_second:.1f} a second; "
        f"{stats.cache_bytes_per_device / 2**20:.1f} MiB of cache a device]",
        file=sys.stderr,
    )
