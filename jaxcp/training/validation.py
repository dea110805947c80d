# SPDX-License-Identifier: Apache-2.0
"""The loss over a whole split, by the reduction of the training step: every token once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcp.context_parallel.overlap import compiler_options
from jaxcp.data.batch import Batch
from jaxcp.data.sources import TokenFiles, WholeSource, as_source
from jaxcp.sharding import Rules
from jaxcp.training.config import LossConfig, TrainConfig
from jaxcp.training.objective import objective
from jaxcp.training.step import State, join


class Loss(NamedTuple):
    """A loss in nats a token, and over how many tokens (the sum of their weights)."""

    mean: float
    tokens: float


def validation_source(config: TrainConfig) -> WholeSource:
    """Make the source that a run is evaluated on.

    Raises:
      ValueError: the run names none, and its data has no validation part.
    """
    source: Any = as_source(
        config.data if config.eval_data is None else config.eval_data, part="val"
    )
    if config.eval_data is None:
        if not isinstance(source, TokenFiles) or source.prepared is None:
            raise ValueError(
                f"eval_every needs eval_data: {config.data!r} is no folder of `jaxcp prepare`, "
                "which has a part for it"
            )
        source = dataclasses.replace(source, part="val")
    if not isinstance(source, WholeSource):
        raise ValueError(f"eval_data must be TokenFiles, TextSource or alike; got {source!r}")
    return source


def whole_loss(
    config: TrainConfig,
    state: State,
    source: WholeSource,
    place: Callable[[Batch], tuple[Any, bool]],
) -> Loss:
    """Compute the mean loss of next tokens over all of a source, in rows of `config.seq_len`.

    Losses are summed in float32 in a batch, over real targets of all devices, and in float64 over
    batches; the sum of weights divides them once.

    Args:
      place: puts a host batch on the mesh, and says whether it is consecutive.
    """
    rows = config.batch_size // config.accumulate
    sums = []
    for first in range(0, source.rows_of_all(config.seq_len), rows):
        batch, in_order = place(source.part_of_all(first, rows, config.seq_len))
        program = _sums(
            config.model, config.strategy, config.loss_chunk, in_order, config.gathered_to
        )
        sums.append(program(state["params"], state["others"], batch))
        jax.block_until_ready(sums[-2:-1])  # one batch may wait behind the one that runs
    total, weight = np.array(sums, np.float64).sum(0)
    return Loss(float(total / weight), float(weight))


@functools.lru_cache(maxsize=8)
def _sums(
    model_config: Any, strategy: Any, chunk: int, consecutive: bool, rules: Rules | None
) -> Callable:
    """Make the program that sums the losses and the weights of a batch `[1, B, T]`."""

    def sums(params, others, batch):
        model = join(model_config, {"params": params, "others": others}, rules)
        piece = jax.tree.map(lambda x: x[0], batch)
        _, totals = objective(
            model, piece, LossConfig(), scales=None,
            strategy=strategy, consecutive=consecutive, chunk=chunk,
        )  # fmt: skip
        return totals.parts["loss"], totals.weight

    return jax.jit(sums, compiler_options=compiler_options())
