# SPDX-License-Identifier: Apache-2.0
"""Stages of a context, tried when the run begins: what the last of them needs is known then."""

import itertools
import logging
from typing import Any

import jax

from jaxcp.training.batches import Batches
from jaxcp.training.config import TrainConfig
from jaxcp.training.context import base_of
from jaxcp.training.flops import document_lengths
from jaxcp.training.metrics import Record
from jaxcp.training.step import abstract_inputs, make_step

logger = logging.getLogger(__name__)


def check_growth(config: TrainConfig, mesh: jax.sharding.Mesh, batches: Batches) -> None:
    """Read the first batch of each stage, and trace its step.

    Where documents do not see each other and none of them is longer than the rows before, longer
    rows bring nothing, which is logged.

    Raises:
      ValueError: the data has no such rows, or a strategy cannot cut them.
      NotImplementedError: a strategy cannot honour what a step of a stage asks for.
    """
    runs = list(config.stages.items())
    for (_, before), (begun, run) in itertools.pairwise(runs):
        host, _ = batches.read(begun)
        if "segment_ids" in host and document_lengths(host).max() <= before.seq_len:
            logger.warning(
                "context of %d tokens from step %d on: no document of its first batch is longer "
                "than the %d before, and documents do not see each other (isolate=False lets them)",
                run.seq_len, begun + 1, before.seq_len,
            )  # fmt: skip
        trace(run, mesh, batches.in_order(host))


def trace(run: TrainConfig, mesh: jax.sharding.Mesh, in_order: bool) -> None:
    """Trace the step of a run, which computes and compiles nothing."""
    step = make_step(
        run.model, run.strategy, run.optimizer, run.cycles, run.loss_chunk, in_order, run.losses,
        run.zero, run.rules,
    )  # fmt: skip
    jax.eval_shape(step, *abstract_inputs(run, mesh))


def in_record(config: TrainConfig, step: int) -> Record:
    """Say what the context is at a step, where it grows."""
    if not config.context:
        return {}
    run = config.at(step)
    base: Any = base_of(run.model)
    return {"context": run.seq_len} | ({} if base is None else {"rope_theta": base})
