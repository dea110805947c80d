# SPDX-License-Identifier: Apache-2.0
"""The training run: steps, a record now and then, a checkpoint now and then, and resuming."""

import dataclasses
import functools
import json
import logging
import math
import pathlib
import time
from typing import Any

import jax

from jaxcp.data.lookahead import draft_batch
from jaxcp.data.sources import as_source, checked, consecutive, prefetch, put
from jaxcp.data.windows import windows
from jaxcp.input_files import JSON_BYTES, read_bytes
from jaxcp.layout import Zigzag
from jaxcp.training import checkpoint
from jaxcp.training.config import TrainConfig, differences, identity
from jaxcp.training.metrics import Callback, MetricsFile, ProgressBar, Record, as_json
from jaxcp.training.step import State, init_state, join, make_step

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run; `model` has the final parameters, on the mesh of the run."""

    final_loss: float
    steps: int
    resumed_from: int | None
    seconds: float
    metrics_path: pathlib.Path
    checkpoint_path: pathlib.Path
    model: Any


def train(
    config: TrainConfig, *, progress: bool = False, callbacks: tuple[Callback, ...] = ()
) -> Result:
    """Train until `config.steps`, or until `stop_after` or `max_seconds`, and save.

    Resumes from the newest readable checkpoint in `config.out_dir`, bit for bit on the same mesh;
    another mesh or strategy may continue it too. Uses the first `config.mesh.size` devices.

    Args:
      progress: draw a progress bar.
    Raises:
      ValueError: `out_dir` holds another run, naming the fields that differ; a mesh that the
        devices cannot make; data that is missing, broken or out of the vocabulary.
      FloatingPointError: the loss is not finite. The checkpoint before stays the newest.
    """
    mesh = config.mesh.make(jax.devices()[: config.mesh.size])
    claim(config)
    with jax.set_mesh(mesh):
        return Run(config, mesh).go((*callbacks, ProgressBar()) if progress else callbacks)


def claim(config: TrainConfig) -> None:
    """Write the run's `identity` into `out_dir/config.json`, or check that the one there agrees."""
    out_dir = pathlib.Path(config.out_dir)
    path, ours = out_dir / "config.json", identity(config)
    if path.exists() and checkpoint.steps(out_dir / CHECKPOINTS):
        lines = differences(_recorded(path), ours)
        if lines:
            raise ValueError(
                f"{out_dir} holds a run with another configuration: {'; '.join(lines)}. "
                "Use another out_dir, or set these back to resume"
            )
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name("config.json.new")
    fresh.write_text(json.dumps(ours, indent=1))
    fresh.replace(path)


def _recorded(path: pathlib.Path) -> Any:
    try:
        return json.loads(read_bytes(path, JSON_BYTES))  # with Infinity, where a run has it
    except (ValueError, RecursionError) as error:
        raise ValueError(f"needed the configuration of a run; got {path}: {error}") from error


CHECKPOINTS = "checkpoints"


class Run:
    """A run on a mesh: its source, its state, the program of a step."""

    def __init__(self, config: TrainConfig, mesh: jax.sharding.Mesh):
        self.began = time.perf_counter()
        self.config, self.mesh = config, mesh
        self.checkpoints = pathlib.Path(config.out_dir) / CHECKPOINTS
        self.layout = getattr(config.strategy, "layout", Zigzag())
        self.source = as_source(config.data, config.seed)

    def go(self, callbacks: tuple[Callback, ...]) -> Result:
        config = self.config
        state = init_state(config)
        restored = checkpoint.restore(self.checkpoints, state)
        start = 0
        if restored is not None:
            start, state = restored
            logger.info("resumed from step %d in %s", start, self.checkpoints)
        metrics = MetricsFile(pathlib.Path(config.out_dir) / "metrics.jsonl", resumed_at=start)
        end = min(config.steps, config.stop_after or config.steps)
        for callback in callbacks:
            callback.start(step=start, steps=end)
        try:
            if start < end:
                state = self.loop(state, start, end, metrics, callbacks)
        finally:
            for callback in callbacks:
                callback.stop()
        step = int(state["step"])
        return Result(
            final_loss=metrics.records[-1]["loss"] if metrics.records else math.nan,
            steps=step,
            resumed_from=None if restored is None else start,
            seconds=self.seconds(),
            metrics_path=metrics.path,
            checkpoint_path=self.checkpoints / str(step),
            model=join(config.model, state),
        )

    def loop(self, state: State, start, end, metrics: MetricsFile, callbacks) -> State:
        config = self.config
        options = (
            config.model,
            config.strategy,
            config.optimizer,
            config.steps,
            config.loss_chunk,
        )
        meter = _Meter(metrics.records[-1]["tokens"] if metrics.records else 0)
        running = None
        batches = prefetch(self.batch, start, end)
        for step, (batch, count, in_order) in enumerate(batches, start + 1):
            state, out = make_step(*options, in_order, config.losses)(state, batch)
            # Only one step may wait behind the one that runs: time and memory stay what they seem.
            jax.block_until_ready(running)
            running = out
            meter.tokens += count
            last = step == end or self.seconds() >= config.max_seconds
            save = last or step % config.checkpoint_every == 0
            report = save or step % config.log_every == 0
            if report:
                record = {"step": step} | as_json(out, whole=save)
                self.check_finite(record)
                record |= meter.read() | {"seconds": self.seconds()}
                metrics.write(record)  # before the checkpoint: a step on disk has its record
                for callback in callbacks:
                    callback.log(record)
            if save:
                checkpoint.save(self.checkpoints, step, state, keep=config.keep)
            if report or step == start + 1:
                jax.block_until_ready(out)
                meter.mark()  # so that neither compiling nor saving counts as training
            if last:
                break
        return state

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def check_finite(self, record: Record) -> None:
        if not math.isfinite(record["loss"] + record["grad_norm"]):
            raise FloatingPointError(
                f"step {record['step']} has loss {record['loss']} and gradient norm "
                f"{record['grad_norm']}; lower the learning rate or raise warmup_steps. "
                f"{self.checkpoints} still holds the state before"
            )

    def batch(self, step: int):
        config = self.config
        arguments = step, config.batch_size, config.seq_len
        locate = getattr(self.source, "locate", None)
        host = checked(
            self.source.batch(*arguments),
            vocab_size=config.model.vocab_size,
            max_positions=getattr(config.model, "max_positions", None),
            locate=locate and functools.partial(locate, *arguments),
        )
        count = host["tokens"].size
        if depth := getattr(config.model, "num_mtp_layers", 0):
            host |= draft_batch(host, depth)
        width = getattr(config.model, "ngram_width", 1)
        host["tokens"] = windows(host["tokens"], width, segment_ids=host.get("segment_ids"))
        batch = put(host, mesh=self.mesh, layout=self.layout, accumulate=config.accumulate)
        # window layers exchange the window alone where programs know who lies where
        return batch, count, consecutive(host) and not self.layout.by_segment


class _Meter:
    """Counts tokens, and tokens a second since the last mark."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.marked: tuple[float, int] | None = None

    def mark(self) -> None:
        self.marked = time.perf_counter(), self.tokens

    def read(self) -> Record:
        speed = None
        if self.marked is not None:
            speed = (self.tokens - self.marked[1]) / (time.perf_counter() - self.marked[0])
        return {"tokens": self.tokens, "tokens_per_second": speed}
