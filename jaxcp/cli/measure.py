# SPDX-License-Identifier: Apache-2.0
"""Commands that measure what a checkpoint can do: `eval needle`, and the demo."""

import json
import pathlib

from tyro.conf import OmitArgPrefixes

from jaxcp.checkpoints import NEEDLE
from jaxcp.cli.devices import ONE_DEVICE, Devices, loaded
from jaxcp.cli.terminal import at_least_one


def demo(out: pathlib.Path = pathlib.Path("out/demo"), *, smoke: bool = False) -> None:
    """The main job on what the package ships: long texts over eight emulated devices, training.

    Args:
        out: folder for the two pictures, the table and the training run.
        smoke: the same path with short contexts and seconds of training.
    """
    from jaxcp.cli.demo import run

    run(out, smoke=smoke)


def eval_needle(
    *,
    checkpoint: pathlib.Path = NEEDLE,
    lengths: tuple[int, ...] = (2_048, 8_192, 32_768, 131_072),
    needles: int = 20,
    haystacks: int = 1,
    seed: int = 0,
    out: pathlib.Path = pathlib.Path("out/needle"),
    devices: OmitArgPrefixes[Devices] = ONE_DEVICE,
) -> None:
    """Find needles in real text; prints exact match and draws a heat map (length x depth).

    Args:
        checkpoint: folder with config.json, *.safetensors and tokenizer.json.
        lengths: haystacks, in bytes.
        needles: needles, and questions, a haystack.
        haystacks: haystacks a length.
        seed: of the haystacks.
        out: folder for needle.png and needle.json.
        devices: how the devices are used.
    """
    if not lengths:
        raise ValueError("--lengths needs one number or more")
    at_least_one(needles=needles, haystacks=haystacks)
    with loaded(checkpoint, devices) as (model, tokenizer):
        from rich.progress import Progress

        from jaxcp.evaluate.needle import evaluate_needle, plot_heat_map
        from jaxcp.evaluate.pictures import draw_if_possible

        with Progress(transient=True) as bar:
            task = bar.add_task("needles", total=len(lengths) * haystacks * needles)
            result = evaluate_needle(
                model, tokenizer, lengths=lengths, needles=needles, haystacks=haystacks, seed=seed,
                on_answer=lambda _: bar.advance(task),
            )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    picture = draw_if_possible(plot_heat_map, result, out / "needle.png")
    (out / "needle.json").write_text(json.dumps(result.as_json(), indent=1))
    for length in result.lengths():
        asked = sum(answer.length == length for answer in result.answers)
        print(f"{length:>9,} bytes  {100 * result.accuracy(length):6.2f} % of {asked}")
    print(picture)
