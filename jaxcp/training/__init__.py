# SPDX-License-Identifier: Apache-2.0
"""Training: `train(TrainConfig(...))`."""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
from jaxcp.data.sources import BatchSource, TextSource, TokenFiles
from jaxcp.training.config import LossConfig, OptimizerConfig, TrainConfig, load_run
from jaxcp.training.loop import Result, train
from jaxcp.training.metrics import Callback, ProgressBar, plot_loss, read_metrics

__all__ = [
    "BatchSource",
    "Callback",
    "LossConfig",
    "OptimizerConfig",
    "ProgressBar",
    "Result",
    "TextSource",
    "TokenFiles",
    "TrainConfig",
    "load_run",
    "plot_loss",
    "read_metrics",
    "train",
]
