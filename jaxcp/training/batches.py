# SPDX-License-Identifier: Apache-2.0
"""The batches of a run, on its mesh."""

import functools
from typing import Any

import jax
import numpy as np

from jaxcp.data.batch import Batch
from jaxcp.data.lookahead import draft_batch
from jaxcp.data.placing import Share, put, share_of, whole
from jaxcp.data.sources import BatchSource, as_source, checked, consecutive
from jaxcp.data.windows import windows
from jaxcp.layout import Zigzag
from jaxcp.training import flops
from jaxcp.training.config import TrainConfig
from jaxcp.training.meter import Work


class Batches:
    """Reads, checks and places the batches of a run.

    Of several processes each reads only the rows whose tokens its devices hold, where the source
    can read a part of them (`some_rows`), and places only its pieces of them.
    """

    def __init__(self, config: TrainConfig, mesh: jax.sharding.Mesh):
        self.config, self.mesh = config, mesh
        self.layout = getattr(config.strategy, "layout", Zigzag())
        self.source: BatchSource = as_source(config.data, config.seed)

    def batch(self, step: int) -> tuple[Any, Work, bool]:
        """The batch of a step on the mesh, its work, and whether it is consecutive."""
        config = self.config
        host, share = self.read(step)
        if depth := getattr(config.model, "num_mtp_layers", 0):
            host |= draft_batch(host, depth)
        placed = self.put(host, config.accumulate, share)
        return placed, self.work(host, share), self.in_order(host)

    def read(self, step: int) -> tuple[Batch, Share]:
        """Read what this process holds of the batch of a step, or all of it; and which rows."""
        config = self.config
        rows, length = config.batch_size, config.at(step + 1).seq_len
        if jax.process_count() > 1 and getattr(self.source, "by_rows", False):
            share = share_of(self.mesh, rows, config.accumulate)
            host = self.source.some_rows(step, rows, length, share.rows)  # type: ignore[attr-defined]
            return self.checked(host, self.locate(step, share.rows)), share
        host = self.checked(self.source.batch(step, rows, length), self.locate(step))
        got = host["tokens"].shape[1]
        if config.context and got != length:
            raise ValueError(
                "a context in stages needs a source whose rows have the length that it is asked "
                f"for; step {step + 1} has {length} tokens in a row, and got {got} from "
                f"{config.data!r:.80}"
            )
        return host, whole(len(host["tokens"]), self.mesh, config.accumulate)

    def work(self, host: Batch, share: Share) -> Work:
        """Count the tokens of the whole batch, and the FLOPs of the rows that are ours to count."""
        model = self.config.model
        ours = {name: x[share.counted] for name, x in host.items()}
        tokens = share.total * host["tokens"].shape[1]
        return Work(tokens, flops.flops_of(model, ours), flops.mask_of(model, host))

    def locate(self, step: int, rows: np.ndarray | None = None) -> Any:
        """Give what says where the token at `(row, place)` of a batch was read; None if nothing.

        Args:
          rows: the numbers in the batch of the rows that were read; None where all were.
        """
        locate = getattr(self.source, "locate", None)
        if locate is None:
            return None
        config = self.config.at(step + 1)
        of_batch = functools.partial(locate, step, config.batch_size, config.seq_len)
        if rows is None:
            return of_batch
        return lambda row, place: of_batch(int(rows[row]), place)

    def place(self, batch: Batch) -> tuple[Any, bool]:
        """Put a batch without drafts on the mesh, in one piece."""
        host = self.checked(batch, None)
        return self.put(host, 1), self.in_order(host)

    def checked(self, batch: Batch, locate: Any) -> Batch:
        model = self.config.model
        return checked(
            batch,
            vocab_size=model.vocab_size,
            max_positions=getattr(model, "max_positions", None),
            locate=locate,
        )

    def in_order(self, host: Batch) -> bool:
        # window layers exchange the window alone where programs know who lies where
        return consecutive(host) and not self.layout.by_segment

    def put(self, host: Batch, accumulate: int, share: Share | None = None) -> Any:
        width = getattr(self.config.model, "ngram_width", 1)
        ids = windows(host["tokens"], width, segment_ids=host.get("segment_ids"))
        host = host | {"tokens": ids}
        return put(host, mesh=self.mesh, layout=self.layout, accumulate=accumulate, share=share)
