# SPDX-License-Identifier: Apache-2.0
"""Measures what keys and values in 8 bits change: logits, perplexity, needles, bytes.

Of a checkpoint with random weights every layer of which sees everything, and of the shipped one, of
which one layer in four does. Each token of a text attends to what the pool keeps of those before
it, its own included.

    python -m benchmarks.cache_formats --out benchmarks/results
"""

import dataclasses
import datetime
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxcp
from benchmarks.tables import table, versions, write
from jaxcp.attention.pool import OverPool
from jaxcp.checkpoints import NEEDLE
from jaxcp.data.haystack import DIGITS, QUESTION, make_haystack
from jaxcp.data.windows import windows

RANDOM = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "qwen3-moe-tiny"
FORMATS = (None, "int8", "float8_e4m3fn")
PAGE = 32


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for cache_formats.md; None prints alone."""
    tokens: int = 2_048
    """Bytes of the text, and of each haystack."""
    needles: int = 20
    haystacks: int = 2
    seed: int = 0


def pool_logits(model, ids, cache_dtype: str | None):
    """Logits `[T, V]` of the tokens `ids [T]`, computed at once over the pages that they fill."""
    ids = np.asarray(ids, np.int32)
    window = windows(ids[None], getattr(model.config, "ngram_width", 1))
    return np.asarray(_pool_logits(model, window, cache_dtype))[0]


@functools.partial(jax.jit, static_argnums=2)
def _pool_logits(model, ids, cache_dtype):
    length, pages = ids.shape[1], -(-ids.shape[1] // PAGE)
    pool = model.init_pool(pages=pages, page=PAGE, states=1, cache_dtype=cache_dtype)
    positions, zero = jnp.arange(length, dtype=jnp.int32)[None], jnp.zeros(1, jnp.int32)
    attend = OverPool(
        pool, positions, zero, zero + length, pages=jnp.arange(pages, dtype=jnp.int32)[None],
        states=zero, sharded=True,
    )  # fmt: skip
    return model.logits(model.forward(ids, positions, attend)[0])


def bytes_a_token(model, cache_dtype: str | None) -> float:
    """Bytes of a token in the pages of every layer; those of states left out."""
    one, two = (
        sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves(
                jax.eval_shape(
                    lambda pages=pages: model.init_pool(
                        pages=pages, page=PAGE, states=1, cache_dtype=cache_dtype
                    )
                )
            )
        )
        for pages in (1, 2)
    )
    return (two - one) / PAGE


def errors(exact, logits):
    """Root mean square errors of the logits of each token, as parts of their standard deviation."""
    return np.sqrt(((logits - exact) ** 2).mean(-1)) / exact.std(-1)


def perplexity(logits, ids) -> float:
    """Numbers of each token of a text but the first."""
    logits = logits[:-1].astype(np.float64)
    high = logits.max(-1, keepdims=True)
    log_total = np.log(np.exp(logits - high).sum(-1)) + high[:, 0]
    return float(np.exp((log_total - logits[np.arange(len(logits)), ids[1:]]).mean()))


def found(model, tokenizer, cache_dtype: str | None, args: Args) -> str:
    """Count the needles that greedy answers name exactly, of all that are asked for."""
    right, asked = 0, 0
    for number in range(args.haystacks):
        haystack = make_haystack(args.tokens, args.needles, seed=args.seed + number)
        engine = jaxcp.Engine(
            model, tokenizer, max_len=args.tokens + 64, max_rows=4, cache_dtype=cache_dtype,
            stop_tokens=(),
        )  # fmt: skip
        prompts = [haystack.text + QUESTION.format(key=key) for key in haystack.keys]
        results = engine.generate(prompts, jaxcp.Sampling(max_new_tokens=DIGITS))
        wanted = [f"{value:0{DIGITS}d}" for value in haystack.values]
        right += sum(x.text == y for x, y in zip(results, wanted, strict=True))
        asked += len(wanted)
    return f"{right} of {asked}"


def rows(name: str, args: Args):
    """A line for each format of one checkpoint."""
    model, tokenizer = jaxcp.load(NEEDLE if name == "needle" else RANDOM)
    text = make_haystack(args.tokens, args.needles, seed=args.seed).text
    ids = np.frombuffer(text.encode(), np.uint8)[: args.tokens].astype(np.int32)
    exact = pool_logits(model, ids, None)
    for cache_dtype in FORMATS:
        logits = pool_logits(model, ids, cache_dtype)
        error = errors(exact, logits)
        same = (logits.argmax(-1) == exact.argmax(-1)).mean()
        yield (
            name, cache_dtype or "exact", f"{bytes_a_token(model, cache_dtype):g}",
            f"{np.median(error):.2%}", f"{error.max():.1%}", f"{same:.2%}",
            f"{perplexity(logits, ids):.4f}",
            found(model, tokenizer, cache_dtype, args) if name == "needle" else "",
        )  # fmt: skip


def main(args: Args) -> None:
    head = (
        "checkpoint", "pages", "bytes a token", "median error", "greatest", "same best token",
        "perplexity", "needles found",
    )  # fmt: skip
    lines = [*rows("random", args), *rows("needle", args)]
    write(
        args.out,
        "cache_formats.md",
        f"""# Keys and values in 8 bits

{datetime.date.today()}, {versions("jax")}, CPU.
`python -m benchmarks.cache_formats`; float32 models, {args.tokens:,} bytes of text. An error is
the root mean square of a token's logits less the exact ones, as a part of their standard deviation;
it is great where a router chooses another expert. "random" is `tests/fixtures/qwen3-moe-tiny`.

{table(head, lines)}
""",
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
