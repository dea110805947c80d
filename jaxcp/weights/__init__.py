# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: their files and formats, loading a model from one and saving one."""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
from jaxcp.models import abstract_model
from jaxcp.weights.config_file import load_config
from jaxcp.weights.loading import load
from jaxcp.weights.saving import save

__all__ = ["abstract_model", "load", "load_config", "save"]
