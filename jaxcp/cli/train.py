# SPDX-License-Identifier: Apache-2.0
"""The command that trains: `train`."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from jaxcp.cli.devices import want_devices


def train(
    run: Annotated[str, tyro.conf.Positional],
    *,
    out: pathlib.Path | None = None,
    max_seconds: float | None = None,
    export_dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Run a config: a name, or the path of a Python file with `config() -> TrainConfig`.

    Run it again to go on from its newest checkpoint. A finished run leaves a checkpoint in
    OUT/model that `generate`, `chat` and `eval` read, and OUT/loss.png.

    Args:
        run: a path, or a name: of configs/NAME.py here, or one that comes with jaxcp:
            needle, gpt_cpu, gpt2_124m.
        out: folder of the run; default: the config's.
        max_seconds: stop after so long, saved.
        export_dtype: number format of the exported weights.
    """
    from jaxcp.training.config import load_run

    config = load_run(run)
    if out is not None:
        config = dataclasses.replace(config, out_dir=out)
    if max_seconds is not None:
        config = dataclasses.replace(config, max_seconds=max_seconds)
    want_devices(config.mesh.size)
    from jaxcp.evaluate.pictures import draw_if_possible
    from jaxcp.training import plot_loss
    from jaxcp.training import train as run_training
    from jaxcp.training.export import export

    result = run_training(config, progress=True)
    folder = pathlib.Path(config.out_dir)
    picture = draw_if_possible(plot_loss, result.metrics_path, folder / "loss.png")
    print(f"step {result.steps}, loss {result.final_loss:.4f}, {picture}")
    if result.steps >= config.steps:
        print(f"checkpoint: {export(result, config, folder / 'model', dtype=export_dtype)}")
