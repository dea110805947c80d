# SPDX-License-Identifier: Apache-2.0
"""Draws pictures where matplotlib is installed: an extra, of 97 MB with its own dependencies."""

import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

Data = TypeVar("Data")

HOW_TO_GET_THEM = "pip install matplotlib, or jaxcp with its extra `pictures`"


def new_figure(**options: Any):
    """Make a matplotlib `Figure` that knows no window and no global state, as pyplot's would.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(f"a picture needs matplotlib: {HOW_TO_GET_THEM}") from error
    return Figure(**options)


def draw_if_possible(
    plot: Callable[[Data, pathlib.Path], None], data: Data, path: pathlib.Path
) -> str:
    """Call `plot(data, path)` and return the path; where matplotlib is missing, say so instead."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"no picture without matplotlib ({HOW_TO_GET_THEM})"
    plot(data, path)
    return str(path)
