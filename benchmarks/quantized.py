# SPDX-License-Identifier: Apache-2.0
"""The cost of quantized weights to the shipped checkpoint: errors of logits, perplexity, answers.

The texts are those that it was trained for: CPython's documentation with needles, of a seed that
training did not see, and then every needle's question with its answer. Everything is computed in
float32, so that a difference is that of the weights alone.

    python -m benchmarks.quantized --out benchmarks/results
"""

import dataclasses
import datetime
import math
import pathlib
import tempfile
from typing import Any, get_args

import jax
import numpy as np
import tyro
from rich.progress import track

import jaxcp
from benchmarks.tables import table, versions, write
from jaxcp.checkpoints import NEEDLE
from jaxcp.data.haystack import DIGITS, QUESTION, make_haystack
from jaxcp.weights.quantizing import Weights, quantize

SEED = 20261127


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for quantized.md; None prints alone."""
    length: int = 4_096
    """Bytes of a text, without the questions."""
    texts: int = 4
    needles: int = 16
    """Needles of each text."""


def texts(args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Bytes `[texts, T]`, and which of them are digits of an answer."""
    rows, answers = [], []
    for seed in range(args.texts):
        stack = make_haystack(args.length, args.needles, SEED + seed)
        row, digits = stack.text.encode(), [False] * len(stack.text)
        for key, value in zip(stack.keys, stack.values, strict=True):
            question, answer = QUESTION.format(key=key).encode(), f"{value:06d}]\n".encode()
            row += question + answer
            digits += [False] * len(question) + [True] * DIGITS + [False] * 2
        rows.append(np.frombuffer(row, np.uint8))
        answers.append(digits)
    return np.stack(rows).astype(np.int32), np.array(answers)


def measured(folder: pathlib.Path, tokens: np.ndarray, digits: np.ndarray) -> dict[str, Any]:
    model, _ = jaxcp.load(folder)
    logits = np.stack([jaxcp.logits(model, row[None])[0] for row in tokens]).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    loss = -np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    asked = digits[:, 1:]
    return {
        "logits": logits,
        "bytes": sum(x.nbytes for x in jax.tree.leaves(model)),
        "perplexity": math.exp(loss.mean()),
        "perplexity_answers": math.exp(loss[asked].mean()),
        "answers": float(right[asked].reshape(-1, DIGITS).all(-1).mean()),
    }


def rows(args: Args) -> list[dict[str, Any]]:
    tokens, digits = texts(args)
    plain = measured(NEEDLE, tokens, digits)
    exact = plain.pop("logits")
    results = [{"weights": "bfloat16", "only": "", **plain}]
    jobs = [(weights, only) for weights in get_args(Weights) for only in ("experts", "all")]
    for weights, only in track(jobs, description="quantized"):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "model")
            quantize(NEEDLE, path, weights=weights, only=only)
            one = measured(path, tokens, digits)
        error = np.abs(one.pop("logits") - exact)
        size = {"error_max": float(error.max()), "error_mean": float(error.mean())}
        size["error_999"] = float(np.quantile(error, 0.999))
        results.append({"weights": weights, "only": only, **size, **one})
    about = {"logit_std": float(exact.std()), "tokens": tokens.size}
    results[0] |= about | {"questions": digits.sum() // DIGITS}
    return results


HEAD = (
    "weights", "of", "KiB", "largest error", "99.9 % within", "mean error", "perplexity", "change",
    "of answers", "change", "answers right",
)  # fmt: skip


def markdown(results: list[dict[str, Any]], args: Args) -> str:
    plain = results[0]
    lines = []
    for r in results:
        errors = [
            f"{r[f'error_{x}']:.3f}" if f"error_{x}" in r else "" for x in ("max", "999", "mean")
        ]
        row = [r["weights"], r["only"], f"{r['bytes'] / 1024:,.0f}", *errors]
        for name in ("perplexity", "perplexity_answers"):
            row += [f"{r[name]:.4f}", "" if r is plain else f"{r[name] / plain[name] - 1:+.2%}"]
        lines.append([*row, f"{r['answers']:.1%}"])
    return (
        "# Quantized weights of the shipped checkpoint\n\n"
        f"`python -m benchmarks.quantized --out benchmarks/results`, {versions('jax')} on CPU, "
        f"{datetime.date.today()}: {plain['tokens']:,} bytes of {args.texts} texts, "
        f"{plain['questions']} questions. Logits have a standard deviation of "
        f"{plain['logit_std']:.2f}. Computed in float32; KiB are those of all parameters in "
        f"memory.\n\n{table(HEAD, lines)}"
    )


def main(args: Args) -> None:
    write(args.out, "quantized.md", markdown(rows(args), args))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
