# SPDX-License-Identifier: Apache-2.0
"""Training: `train(TrainConfig(...))`."""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
from jaxcp.data.mixture import Mixture
from jaxcp.data.sources import BatchSource, TextSource, TokenFiles
from jaxcp.training.config import (
    LossConfig,
    OptimizerConfig,
    SampleConfig,
    StartConfig,
    TrainConfig,
)
from jaxcp.training.context import ContextStage
from jaxcp.training.export import export_run
from jaxcp.training.loop import Result, train
from jaxcp.training.metrics import Callback, ProgressBar, read_metrics
from jaxcp.training.plots import plot_loss, plot_losses
from jaxcp.training.profile import Profile
from jaxcp.training.runs import load_run

__all__ = [
    "BatchSource",
    "Callback",
    "ContextStage",
    "LossConfig",
    "Mixture",
    "OptimizerConfig",
    "Profile",
    "ProgressBar",
    "Result",
    "SampleConfig",
    "StartConfig",
    "TextSource",
    "TokenFiles",
    "TrainConfig",
    "export_run",
    "load_run",
    "plot_loss",
    "plot_losses",
    "read_metrics",
    "train",
]
