# SPDX-License-Identifier: Apache-2.0
"""A run for `jaxcp train` whose processes strike themselves, as the variable STRIKE says."""

import dataclasses
import os
import signal
import time

from jaxcp.mesh import MeshConfig
from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import OptimizerConfig, TextSource, TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Struck(TextSource):
    """Text; STRIKE="SIGTERM 1 5" sends a signal to process 1 as it reads the batch of step 5."""

    def some_rows(self, step, rows, length, only):
        name, process, at = os.environ.get("STRIKE", "none 0 0").split()
        if os.environ.get("PROCESS") == process and step + 1 == int(at):
            os.kill(os.getpid(), getattr(signal, name))
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return super().some_rows(step, rows, length, only)


def config():
    return TrainConfig(
        model=GPTConfig(vocab_size=256, max_positions=32, num_layers=1, num_heads=2, embed_dim=32),
        seq_len=30,
        batch_size=4,
        accumulate=2,
        steps=12,
        data=Struck(part=(0.0, 0.9)),
        eval_data=TextSource(part=(0.995, 1.0)),
        eval_every=6,
        optimizer=OptimizerConfig(warmup_steps=2, learning_rate=1e-2),
        mesh=MeshConfig(data=2),
        out_dir="runs/struck",
        checkpoint_every=4,
        log_every=1,
        loss_chunk=32,
    )
