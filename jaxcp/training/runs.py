# SPDX-License-Identifier: Apache-2.0
"""Finds the runs that are Python files."""

import importlib.util
import pathlib

from jaxcp.training.config import TrainConfig


def load_run(path_or_name: str | pathlib.Path) -> TrainConfig:
    """Load the run of a Python file with `def config() -> TrainConfig`.

    Takes a path, or the name of a file in `configs/` of the working directory or, if there is none,
    among the runs that jaxcp ships.

    Raises:
      ValueError: no such file, naming those that exist; or a file without `config()`.
    """
    folders = [pathlib.Path("configs"), pathlib.Path(__file__).parents[1] / "configs"]
    candidates = [
        pathlib.Path(path_or_name),
        *(folder / f"{path_or_name}.py" for folder in folders),
    ]
    path = next((p for p in candidates if p.suffix == ".py" and p.is_file()), None)
    if path is None:
        names = sorted({p.stem for folder in folders for p in folder.glob("[!_]*.py")})
        raise ValueError(
            f"no run {str(path_or_name)!r}: give a path to a .py file or one of {names}"
        )
    spec = importlib.util.spec_from_file_location(f"jaxcp_run_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise ValueError(f"{path} must define config() -> TrainConfig")
    run = module.config()
    if not isinstance(run, TrainConfig):
        raise ValueError(f"config() of {path} must return a TrainConfig; got {type(run).__name__}")
    return run
