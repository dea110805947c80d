# SPDX-License-Identifier: Apache-2.0
"""The command that scores texts: `eval perplexity`."""

import json
import pathlib
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from jaxcp.checkpoints import NEEDLE
from jaxcp.cli.devices import ONE_DEVICE, Devices, loaded
from jaxcp.cli.terminal import at_least_one

CONTEXT = 2048


def eval_perplexity(
    files: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    checkpoint: pathlib.Path = NEEDLE,
    context: tuple[int, ...] | None = None,
    stride: int | None = None,
    rows: int = 1,
    field: str = "text",
    part: Literal["train", "val"] = "val",
    max_tokens: int | None = None,
    strategy: str = "Ring",
    json_line: Annotated[bool, tyro.conf.arg(name="json")] = False,
    out: pathlib.Path | None = None,
    devices: OmitArgPrefixes[Devices] = ONE_DEVICE,
) -> None:
    """Loss, perplexity and bits a byte of texts: every token is predicted once.

    A window of so many tokens (--context) goes over each document; the next one begins --stride
    tokens later and predicts what the one before did not reach. A small stride gives every token
    much context, and takes longer; --stride equal to --context is what an evaluation of `jaxcp
    train` does. A table says how the loss falls with the tokens that were seen before.

    Args:
        files: text (a file is a document), JSON lines (also .gz), Parquet, "tinyshakespeare", or a
            folder of `jaxcp prepare` that was made with the checkpoint's tokenizer.
        checkpoint: folder with config.json, *.safetensors and tokenizer.json.
        context: tokens of a window; several numbers compare several lengths (default: 2048, or as
            many as the model has positions).
        stride: tokens from one window to the next, up to --context (default: half of it).
        rows: windows that are computed at a time.
        field: the field of JSON, or the column of Parquet, that has the text.
        part: of a folder of `jaxcp prepare`.
        max_tokens: predict the first so many tokens alone.
        strategy: of attention over --seq, as AllGather or "USP(ulysses=2)".
        json_line: print one line of JSON, with all numbers, in place of the table.
        out: a PNG with the loss by the tokens that were seen before.
        devices: how the devices are used.
    """
    at_least_one(stride=stride, rows=rows, max_tokens=max_tokens)
    for length in context or ():
        at_least_one(context=length)
    if out is not None and out.suffix != ".png":
        raise ValueError(f"--out is a picture, such as loss.png; got {out}")
    with loaded(checkpoint, devices) as (model, tokenizer):
        from rich.progress import Progress

        from jaxcp.evaluate.perplexity import evaluate_perplexity
        from jaxcp.evaluate.texts import read_texts
        from jaxcp.training.overrides import read_strategy

        chosen = read_strategy(strategy)
        texts = read_texts(files, tokenizer, field=field, part=part, max_tokens=max_tokens)
        limit = getattr(model.config, "max_positions", CONTEXT)
        lengths = context or (min(CONTEXT, limit),)
        total = len(lengths) * sum(text.predicted for text in texts)
        with Progress(transient=True, disable=json_line) as bar:
            task = bar.add_task("tokens", total=total)
            results = [
                evaluate_perplexity(
                    model, texts, context=length, stride=stride, rows=rows, strategy=chosen,
                    on_tokens=lambda count: bar.advance(task, count),
                )
                for length in lengths
            ]  # fmt: skip
    if json_line:
        print(json.dumps({"checkpoint": str(checkpoint), "files": list(files)} | _fields(results)))
    else:
        _print_results(results)
    if out is not None:
        _draw(results, out, quiet=json_line)


def _fields(results) -> dict:
    return {"results": [result.as_json() for result in results]}


def _print_results(results) -> None:
    """Print a line for each length of context, then the losses by what was seen before."""
    print(
        f"{'context':>9}{'stride':>9}{'tokens':>12}{'loss':>9}{'perplexity':>12}{'bits/byte':>11}"
    )
    for result in results:
        bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        cells = f"{result.context:>9,}{result.stride:>9,}{result.tokens:>12,}{result.loss:>9.4f}"
        print(f"{cells}{result.perplexity:>12.4f}{bits:>11}")
    for result in results:
        seen = f"a token was predicted from {result.seen:,.1f} in the mean"
        print(f"\ncontext {result.context:,}: {seen}")
        print(f"{'seen before':>19}{'tokens':>12}{'loss':>9}")
        for bucket in result.buckets:
            seen = f"{bucket.least:,} to {bucket.most:,}"
            print(f"{seen:>19}{bucket.tokens:>12,}{bucket.loss:>9.4f}")


def _draw(results, out: pathlib.Path, *, quiet: bool) -> None:
    from jaxcp.evaluate.perplexity import plot_perplexity
    from jaxcp.evaluate.pictures import draw_if_possible

    out.parent.mkdir(parents=True, exist_ok=True)
    picture = draw_if_possible(plot_perplexity, results, out)
    if not quiet:
        print(picture)
