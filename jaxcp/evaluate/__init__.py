# SPDX-License-Identifier: Apache-2.0
"""Measures what a checkpoint can do."""

from jaxcp.evaluate.agent import evaluate_agent, make_trace, plot_turns, read_trace
from jaxcp.evaluate.load import Workload, measure_load
from jaxcp.evaluate.load_report import plot_load, summary
from jaxcp.evaluate.needle import evaluate_needle, plot_heat_map
from jaxcp.evaluate.perplexity import evaluate_perplexity, plot_perplexity
from jaxcp.evaluate.texts import read_texts

__all__ = [
    "Workload",
    "evaluate_agent",
    "evaluate_needle",
    "evaluate_perplexity",
    "make_trace",
    "measure_load",
    "plot_heat_map",
    "plot_load",
    "plot_perplexity",
    "plot_turns",
    "read_texts",
    "read_trace",
    "summary",
]
