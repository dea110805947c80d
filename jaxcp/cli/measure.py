# SPDX-License-Identifier: Apache-2.0
"""Commands that measure what a checkpoint can do: `eval needle`, `eval agent`, and the demo."""

import json
import pathlib
from typing import Any, Literal

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


def eval_agent(
    *,
    checkpoint: pathlib.Path = NEEDLE,
    trace: pathlib.Path | None = None,
    turns: int | None = None,
    outputs: tuple[int, ...] | None = None,
    new_tokens: int | None = None,
    system: int | None = None,
    seed: int | None = None,
    drafts: int = 0,
    cache_dtype: Literal["int8", "float8_e4m3fn"] | None = None,
    out: pathlib.Path = pathlib.Path("out/agent.json"),
    devices: OmitArgPrefixes[Devices] = ONE_DEVICE,
) -> None:
    """Run an agent's turns, which append what a tool says; a table and a picture of their seconds.

    Args:
        checkpoint: folder with config.json, *.safetensors and tokenizer.json.
        trace: a file that --out wrote, whose turns are run again.
        turns: of a new trace (default 495), or the first so many of --trace.
        outputs: characters of the tool's outputs in a new trace, turn by turn and over again
            (default 100 400 100).
        new_tokens: tokens of each answer in a new trace (default 16).
        system: characters before the first output of a new trace (default 2000).
        seed: of a new trace (default 0).
        drafts: tokens that are guessed in a step at most, up to 7.
        cache_dtype: 8 bits for keys and values of layers that see everything.
        out: file for the trace and the numbers of each turn; the picture lies beside it.
        devices: how the devices are used.
    """
    at_least_one(turns=turns)
    if out.suffix != ".json":
        raise ValueError(f"--out is a file such as agent.json, with agent.png beside it; got {out}")
    sizes = {"outputs": outputs, "new_tokens": new_tokens, "system": system, "seed": seed}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    played = _trace(trace, turns, sizes)
    with loaded(checkpoint, devices) as (model, tokenizer):
        from rich.progress import Progress

        from jaxcp.evaluate.agent import evaluate_agent, plot_turns
        from jaxcp.evaluate.pictures import draw_if_possible

        with Progress(transient=True) as bar:
            task = bar.add_task("turns", total=len(played))
            result = evaluate_agent(
                model, tokenizer, played, drafts=drafts, cache_dtype=cache_dtype,
                on_turn=lambda _: bar.advance(task),
            )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result.as_json(), indent=1))
    picture = draw_if_possible(plot_turns, result, out.with_suffix(".png"))
    _print_turns(result)
    print(f"{out}   {picture}")


def _trace(file: pathlib.Path | None, turns: int | None, sizes: dict[str, Any]):
    """Make the turns that the options describe, or read them."""
    from jaxcp.evaluate.agent import TURNS, make_trace, read_trace

    if file is None:
        return make_trace(turns or TURNS, **sizes)
    if sizes:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sizes)
        raise ValueError(f"the turns of {file} are as they are: leave out {names}, or --trace")
    played = read_trace(file)
    if turns is not None and turns > len(played):
        raise ValueError(f"--turns {turns}: {file} has {len(played)}")
    return played[:turns]


def _print_turns(result) -> None:
    """Print the turns 1, 2, 5, 10, 20, ... and the last, then all of them together."""
    columns = ("computed", "reused", "generated", "accepted", "first token", "seconds")
    print(f"{'turn':>9}" + "".join(f"{name:>13}" for name in columns))
    last = len(result.measured)
    wanted = [i for power in range(7) for i in (10**power, 2 * 10**power, 5 * 10**power)]
    for number in [*(i for i in wanted if i < last), last]:
        print(_turn_line(f"{number:,}", result.measured[number - 1]))
    print(_turn_line("all", result.totals()))
    print(f"{100 * result.reused_share:.1f} % of the tokens before answers were reused")


def _turn_line(name: str, turn) -> str:
    counts = turn.prefilled, turn.reused, turn.generated, turn.accepted
    cells = [f"{x:,}" for x in counts]
    cells += [f"{x:.3f}" for x in (turn.first_token_seconds, turn.seconds)]
    return f"{name:>9}" + "".join(f"{cell:>13}" for cell in cells)
