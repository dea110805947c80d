# SPDX-License-Identifier: Apache-2.0
"""The training run: steps, a record now and then, a checkpoint now and then, and resuming."""

import contextlib
import dataclasses
import logging
import math
import pathlib
import shutil
from typing import Any

import jax

from jaxcp import processes
from jaxcp.data.placing import prefetch
from jaxcp.training import checkpoint, flops, shards
from jaxcp.training.batches import Batches
from jaxcp.training.config import TrainConfig
from jaxcp.training.folder import check_data, claim
from jaxcp.training.growth import check_growth, in_record
from jaxcp.training.meter import Meter
from jaxcp.training.metrics import Callback, MetricsFile, ProgressBar, Record, as_json
from jaxcp.training.profile import Profile
from jaxcp.training.programs import Programs
from jaxcp.training.samples import room_for, sample
from jaxcp.training.signals import Signals
from jaxcp.training.skips import Skips, sources_of, verdict
from jaxcp.training.start import CHECKPOINTS
from jaxcp.training.step import State, init_state, join, make_step, places_of
from jaxcp.training.tokens import tokenizer_of
from jaxcp.training.validation import validation_source, whole_loss
from jaxcp.training.zero import in_words

logger = logging.getLogger(__name__)

BEST, METRICS, TRACES = "best", "metrics.jsonl", "profile"
DATA, PROGRAMS = "data.json", "xla_cache"
STOPS = ("", "max_seconds", "SIGINT", "SIGTERM")
"""Reasons for a process to ask that the run stops; of several the last one counts."""


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
    eval_loss: float | None = None
    """The last one; None without evaluations."""
    best_loss: float | None = None
    best_step: int | None = None
    """The evaluation with the lowest loss, whose state lies in `out_dir/best`."""
    stopped_by: str = "steps"
    """"steps" where the run is done, else "stop_after", "max_seconds", "SIGTERM" or "SIGINT"."""


def train(
    config: TrainConfig,
    *,
    progress: bool = False,
    callbacks: tuple[Callback, ...] = (),
    profile: Profile | None = None,
) -> Result:
    """Train until `config.steps`, or until `stop_after` or `max_seconds`, and save.

    Resumes from the newest readable checkpoint in `config.out_dir`, bit for bit on the same mesh;
    another mesh or strategy may continue it too. Uses the first `config.mesh.size` devices.

    In the main thread, SIGTERM and Ctrl-C end the run after the step it is at, saved, as
    `max_seconds` does; a second one ends the process, code 143 or 130.

    Of several processes (`jaxcp.processes.join`) each calls this with the same config; the devices
    of all make the mesh, and `out_dir` is a folder that all see. The first one writes the metrics
    and has the callbacks. A signal at any of them ends the run in all, after at most two steps
    more. Where one is lost the others end at once, code 75.

    Args:
      progress: draw a progress bar.
      profile: steps to trace, into `out_dir/profile`.
    Raises:
      ValueError: `out_dir` holds another run, naming the fields that differ; a mesh that the
        devices cannot make; data that is missing, broken, out of the vocabulary, or not in the
        files that the run began with; processes that disagree on these, or share no `out_dir`.
      FloatingPointError: `max_skipped` steps in a row, or all of the run, were not finite; it says
        whether the data or the learning rate is at fault. The checkpoint before stays the newest.
      OSError: a checkpoint could not be written.
    """
    with processes.tied():
        mesh = mesh_of(config)
        claim(config)
        run = processes.together(lambda: Run(config, mesh, profile=profile))
        if not processes.is_first():
            progress, callbacks = False, ()
        with jax.set_mesh(mesh), run.programs.kept():
            return run.go((*callbacks, ProgressBar()) if progress else callbacks)


def mesh_of(config: TrainConfig) -> jax.sharding.Mesh:
    """Make the mesh of a run; of several processes, over the devices of all.

    Raises:
      ValueError: the mesh needs more devices than there are or, of several processes, fewer.
    """
    processes.check_takes_all(config.mesh.size)
    return config.mesh.make(jax.devices()[: config.mesh.size])


class Run:
    """A run on a mesh: its source, its state, the program of a step."""

    def __init__(
        self, config: TrainConfig, mesh: jax.sharding.Mesh, *, profile: Profile | None = None
    ):
        self.meter = Meter(peak=flops.peak_of(mesh))
        self.config, self.mesh = config, mesh
        if profile is not None:
            profile.check(config.steps)
        self.profile = profile if processes.is_first() else None
        self.out_dir = pathlib.Path(config.out_dir)
        self.checkpoints = self.out_dir / CHECKPOINTS
        self.programs = Programs(self.out_dir / PROGRAMS if config.keep_programs else None)
        self.batches = Batches(config, mesh)
        self.validation = None if config.eval_every is None else validation_source(config)
        self.tokenizer = None
        if config.samples.every is not None:
            self.tokenizer = tokenizer_of(self.batches.source, config.model.vocab_size)
            if self.tokenizer is None:
                raise ValueError(
                    f"samples need data whose tokenizer is known; got {config.data!r}. Take a "
                    "folder of `jaxcp prepare`, or samples.every=None"
                )
            room_for(config.model, self.tokenizer, config.samples)  # before any step is made

    def go(self, callbacks: tuple[Callback, ...]) -> Result:
        config = self.config
        check_data(self.batches.source)
        processes.by_first(self.claim_data)
        processes.together(lambda: check_growth(config, self.mesh, self.batches))
        resumed, start, state = self.first_state()
        metrics = processes.by_first(lambda: MetricsFile(self.out_dir / METRICS, resumed_at=start))
        last = processes.decide(metrics.records[-1] if metrics and metrics.records else {})
        self.meter.tokens = last.get("tokens", 0)
        self.skips = Skips(config.max_skipped, last.get("skipped", 0))
        stopped = "steps" if start >= config.steps else "stop_after"
        end = min(config.steps, config.stop_after or config.steps)
        for callback in callbacks:
            callback.start(step=start, steps=end)
        try:
            if start < end:
                state, stopped = self.loop(state, start, end, metrics, callbacks)
        finally:
            for callback in callbacks:
                callback.stop()
        step = int(state["step"])
        return Result(
            steps=step,
            resumed_from=start if resumed else None,
            seconds=self.meter.seconds(),
            metrics_path=self.out_dir / METRICS,
            checkpoint_path=self.checkpoints / str(step),
            model=join(config.at(step).model, state, config.gathered_to),
            stopped_by=stopped,
            **processes.decide(self.losses(step, metrics)),
        )

    def claim_data(self) -> None:
        began = bool(checkpoint.steps(self.checkpoints))
        shards.claim(self.out_dir / DATA, self.batches.source, began=began)

    def losses(self, step: int, metrics: MetricsFile | None) -> dict[str, Any]:
        """The losses of a `Result` at a step, by the process that has the records."""
        if metrics is None:
            return {}
        evaluated = self.evaluations(step, metrics)
        best = min(evaluated, key=lambda record: record["eval_loss"], default={})
        return {
            "final_loss": metrics.records[-1]["loss"] if metrics.records else math.nan,
            "eval_loss": evaluated[-1]["eval_loss"] if evaluated else None,
            "best_loss": best.get("eval_loss"),
            "best_step": best.get("step"),
        }

    def first_state(self) -> tuple[bool, int, State]:
        """Make the state to begin with: whether it was resumed, its step, and the state."""
        with self.meter.timed("init"):
            state = jax.block_until_ready(init_state(self.config))
        specs = places_of(self.config).updated.values()
        logger.info("%s", in_words(state, specs, self.mesh.shape))
        with self.meter.timed("restore"):
            restored = checkpoint.restore(self.checkpoints, state)
            if restored is not None:
                logger.info("resumed from step %d in %s", restored.step, self.checkpoints)
                return True, *restored
            start = self.config.start
            if start.run is None or start.step is None:
                return False, 0, state
            other = pathlib.Path(start.run)
            state = checkpoint.read(other / CHECKPOINTS, start.step, state)
            processes.by_first(lambda: _copy_if_there(other / METRICS, self.out_dir / METRICS))
            return False, start.step, state

    def loop(
        self, state: State, start: int, end: int, metrics: MetricsFile | None, callbacks: Any
    ) -> tuple[State, str]:
        """Make the steps; give the last state, and what the run was stopped by."""
        config, meter = self.config, self.meter
        saver = checkpoint.Saver(self.checkpoints, keep=config.keep, keep_every=config.keep_every)
        best = checkpoint.Saver(self.out_dir / BEST, keep=1)
        running, poll = None, processes.Poll(self.mesh)
        # innermost: where a process is lost nothing waits for a save that cannot end
        with Signals() as signals, saver, best, processes.tied():
            batches = prefetch(self.batches.batch, start, end)
            for step, (batch, work, in_order) in enumerate(batches, start + 1):
                first = step == start + 1
                compiles = first or config.begun(step) == step - 1
                state, out = self.step(step, state, batch, in_order, first=first)
                # Only one step may wait behind the one that runs: time and memory stay what they
                # seem.
                if running is not None:
                    self.count(*running, state, last=False)
                running = step, out
                meter.add(work)
                if compiles:
                    jax.block_until_ready(out)
                    self.programs.note()
                if first:
                    meter.startup["first_step"] = meter.seconds()
                wish = STOPS[poll.turn(self.wish(signals))]
                stopped = self.stopped_by(step, end, wish)
                save = bool(stopped) or step % config.checkpoint_every == 0
                report = save or any(self.due(step)) or step % config.log_every == 0
                if report:
                    running = None
                    self.count(step, out, state, last=step == config.steps)
                    record = {"step": step} | as_json(out, whole=save)
                    record |= {"skipped": self.skips.total} | in_record(config, step)
                    record |= meter.read() | self.look(step, state)
                    if metrics is not None:
                        # before the checkpoint: a step on disk has its record
                        metrics.write(record)
                    for callback in callbacks:
                        callback.log(record)
                    if "eval_loss" in record:
                        self.keep_best(step, state, metrics, best)
                if save:
                    saver.save(step, state)
                    self.programs.note()
                saver.check()
                if report or compiles:
                    meter.mark()  # so that neither compiling nor saving counts as training
                if stopped:
                    return state, stopped
        raise AssertionError((start, end))

    def wish(self, signals: Signals) -> int:
        """Give the number of the reason for which this process asks that the run stops."""
        if signals.caught is not None:
            return STOPS.index(signals.caught)
        return STOPS.index("max_seconds") * (self.meter.seconds() >= self.config.max_seconds)

    def stopped_by(self, step: int, end: int, wish: str) -> str | None:
        """Say what the run stops by after a step; None where it goes on."""
        if step == self.config.steps:
            return "steps"
        if wish.startswith("SIG"):
            return wish
        return "stop_after" if step == end else wish or None

    def count(self, step: int, out: Any, state: State, *, last: bool) -> None:
        """Wait for a step; end the run where too many were skipped."""
        if not self.skips.add(out):
            return
        origin = sources_of(self.batches.locate(step - 1), self.config.batch_size)
        numbers = f"loss {float(out['loss'])} and gradient norm {float(out['grad_norm'])}"
        said = f"step {step} has {numbers}; {origin}"
        logger.warning("%s. It is skipped", said)
        if self.skips.too_many(step, last=last):
            in_row = self.skips.in_row
            reason = verdict(self.retry(step - in_row, state))
            raise FloatingPointError(
                f"{said}. It is number {in_row} in a row. {reason}. {self.checkpoints} still holds "
                "the state before"
            )

    def retry(self, step: int, state: State) -> float | None:
        """Compute the loss of an earlier step's batch, for the last time: `state` is donated."""
        if step < 1:
            return None
        batch, _, in_order = self.batches.batch(step - 1)
        _, out = self.step(step, state, batch, in_order, first=False)
        return math.nan if out["skipped"] else float(out["loss"])

    def step(self, step: int, state: State, batch: Any, in_order: bool, first: bool):
        """Make a step, the first by the clock, some with a trace."""
        config = self.config.at(step)
        advance = make_step(
            config.model, config.strategy, config.optimizer, config.cycles, config.loss_chunk,
            in_order, config.losses, config.zero, config.rules,
        )  # fmt: skip
        if self.profile is not None:
            self.profile.before(step, self.out_dir / TRACES)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            # the first call returns when its program is compiled
            with self.meter.timed("compile") if first else contextlib.nullcontext():
                state, out = advance(state, batch)
        if self.profile is not None:
            self.profile.after(step, out)
        return state, out

    def due(self, step: int) -> tuple[bool, bool]:
        """Tell whether a step is evaluated, and whether a text is written."""
        every, samples = self.config.eval_every, self.config.samples.every
        last = step == self.config.steps
        return (
            every is not None and (last or step % every == 0),
            samples is not None and (last or step % samples == 0),
        )

    def look(self, step: int, state: State) -> Record:
        """Evaluate the state and let it write, where that is due."""
        evaluate, write = self.due(step)
        record: Record = {}
        if evaluate:
            assert self.validation is not None
            began = self.meter.seconds()
            run = self.config.at(step)
            loss = whole_loss(run, state, self.validation, self.batches.place)
            record = {"eval_loss": loss.mean, "eval_tokens": loss.tokens}
            record["eval_seconds"] = self.meter.seconds() - began
        if write:
            model = join(self.config.at(step).model, state, self.config.gathered_to)
            assert self.tokenizer is not None
            record["sample"] = sample(model, self.tokenizer, self.config.samples)
        return record

    def evaluations(self, step: int, metrics: MetricsFile) -> list[Record]:
        """The records that have an `eval_loss`: of this run, not of one that it goes on from, and
        with the context of step `step`, as losses over other lengths are others."""
        first = max(self.config.start.step or 0, self.config.begun(step))
        return [r for r in metrics.records if "eval_loss" in r and r["step"] > first]

    def keep_best(
        self, step: int, state: State, metrics: MetricsFile | None, saver: checkpoint.Saver
    ) -> None:
        """Save the state in `best` where its evaluation is the best of the run."""
        if processes.decide(metrics is not None and self.is_new_best(step, metrics)):
            saver.save(step, state)

    def is_new_best(self, step: int, metrics: MetricsFile) -> bool:
        best = min(self.evaluations(step, metrics), key=lambda record: record["eval_loss"])
        return best["step"] == step and step not in checkpoint.steps(self.out_dir / BEST)


def _copy_if_there(source: pathlib.Path, target: pathlib.Path) -> None:
    if source.exists():
        shutil.copyfile(source, target)
