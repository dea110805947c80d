# SPDX-License-Identifier: Apache-2.0
"""Measures what a checkpoint can do."""

from jaxcp.evaluate.needle import evaluate_needle, plot_heat_map

__all__ = ["evaluate_needle", "plot_heat_map"]
