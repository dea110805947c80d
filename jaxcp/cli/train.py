# SPDX-License-Identifier: Apache-2.0
"""Commands of training: `train` a run, `plot` some."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from jaxcp.cli.several import ALONE, Processes, one_of


def train(
    run: Annotated[str, tyro.conf.Positional],
    *,
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="FIELD=VALUE")] = (),
    out: pathlib.Path | None = None,
    max_seconds: float | None = None,
    init_from: str | None = None,
    extend: int | None = None,
    cool_down: int | None = None,
    from_step: int | None = None,
    profile: str | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    export: Literal["last", "best"] = "last",
    export_dtype: Literal["float32", "bfloat16"] = "float32",
    several: OmitArgPrefixes[Processes] = ALONE,
) -> None:
    """Run a config: a name, or the path of a Python file with `config() -> TrainConfig`.

    Run it again to go on from its newest checkpoint; SIGTERM and Ctrl-C save one. A finished run
    leaves a checkpoint in OUT/model that `generate`, `chat` and `eval` read, and OUT/loss.png.
    `jaxcp train RUN --help` lists the fields of the run.

    Args:
        run: a path, or a name: of configs/NAME.py here, or one that comes with jaxcp:
            needle, gpt_cpu, gpt2_124m, shakespeare_char_cpu, shakespeare_char.
        settings: fields of the run, as optimizer.learning_rate=1e-3 steps=500.
        out: folder of the run; default: the config's.
        max_seconds: stop after so long, saved.
        init_from: a checkpoint folder, whose model and weights the run starts with.
        extend: make a finished run so many steps long: its schedule begins anew at its end.
        cool_down: go on from a flat part of the run in its folder, for so many steps in which the
            rate falls to 0; --out is a new folder.
        from_step: the checkpoint that --cool-down goes on from; default: the newest.
        profile: trace COUNT steps from STEP on into OUT/profile: STEP:COUNT.
        tensorboard: write OUT/events.out.tfevents.* too.
        wandb: the project on Weights & Biases to report to (pip install jaxcp[wandb]).
        export: the weights of OUT/model: of the last step, or of the best evaluation.
        export_dtype: number format of the exported weights.
        several: processes that share the run.
    """
    _check(cool_down, from_step, out, extend)
    named = _named(run, settings, init_from)
    with one_of(several, named.mesh.size):
        config = _placed(named, out, max_seconds, extend, cool_down, from_step)
        _train(config, profile, tensorboard, wandb, export, export_dtype)


def _train(config, profile, tensorboard, wandb, export, export_dtype) -> None:
    from jaxcp import processes
    from jaxcp.evaluate.pictures import draw_if_possible
    from jaxcp.training import Profile, export_run, plot_loss
    from jaxcp.training import train as run_training
    from jaxcp.training.optimizer import in_words

    say = print if processes.is_first() else lambda *_: None
    say(in_words(config.optimizer, config.cycles))
    folder = pathlib.Path(config.out_dir)
    result = run_training(
        config,
        progress=True,
        callbacks=_callbacks(folder, tensorboard, wandb, config),
        profile=None if profile is None else Profile.parse(profile),
    )
    if result.stopped_by.startswith("SIG"):
        say(f"{result.stopped_by}: saved at step {result.steps} of {config.steps}; run it again")
        return
    picture = processes.by_first(
        lambda: draw_if_possible(plot_loss, result.metrics_path, folder / "loss.png")
    )
    say(f"step {result.steps}, loss {result.final_loss:.4f}{_evaluated(result)}, {picture}")
    if result.steps >= config.steps:
        written = export_run(result, config, folder / "model", dtype=export_dtype, of=export)
        say(f"checkpoint: {written}")


def plot(
    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional],
    *,
    out: pathlib.Path = pathlib.Path("runs.png"),
) -> None:
    """Draw the losses of runs, and those of their evaluations, in one picture.

    Args:
        runs: folders of runs, or metrics.jsonl files.
        out: the picture, a PNG.
    """
    from jaxcp.training import plot_losses

    plot_losses(runs, out)
    print(out)


def print_fields(arguments: Sequence[str]) -> None:
    """Print the fields of the run that `train RUN --help` names, with their values."""
    named = [word for word in arguments if not word.startswith("-")]
    if not named:
        return
    from jaxcp.training.overrides import fields_of
    from jaxcp.training.runs import load_run

    fields = list(fields_of(load_run(named[0])))
    width = max(len(field.path) for field in fields)
    print(f"Fields of {named[0]}, for --set FIELD=VALUE:\n")
    for field in fields:
        print(f"  {field.path:{width}}  {field.value!r}  ({field.kind})")
    print()


def _check(cool_down, from_step, out, extend) -> None:
    if from_step is not None and cool_down is None:
        raise ValueError("--from-step names the checkpoint of a --cool-down; give both")
    if cool_down is not None and (out is None or extend is not None):
        raise ValueError("--cool-down makes a new run: give its folder by --out, and no --extend")


def _named(run, settings, init_from):
    """The run with its fields set. Computes nothing: the processes have not met yet."""
    from jaxcp.training import start
    from jaxcp.training.overrides import override
    from jaxcp.training.runs import load_run

    config = load_run(run)
    if init_from is not None:
        config = start.from_checkpoint(config, init_from)
    return override(config, settings)


def _placed(config, out, max_seconds, extend, cool_down, from_step):
    """The run with its beginning and its end, which may depend on what its folder holds."""
    from jaxcp.training import start

    if max_seconds is not None:
        config = dataclasses.replace(config, max_seconds=max_seconds)
    if cool_down is not None:
        return start.cooled(config, cool_down, out, from_step)
    if out is not None:
        config = dataclasses.replace(config, out_dir=out)
    return config if extend is None else start.lengthened(config, extend)


def _callbacks(folder: pathlib.Path, tensorboard: bool, project: str | None, config):
    from jaxcp.training.reporting import TensorBoard, WandB

    callbacks = [TensorBoard(folder)] if tensorboard else []
    return (*callbacks, *([] if project is None else [WandB(project, config)]))


def _evaluated(result) -> str:
    if result.eval_loss is None:
        return ""
    best = f"best {result.best_loss:.4f} at step {result.best_step}"
    return f", {result.eval_loss:.4f} on all of eval_data ({best})"
