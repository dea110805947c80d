# SPDX-License-Identifier: Apache-2.0
"""Configuration of a training run: frozen values, checked when made; a run is a Python file."""

import dataclasses
import functools
import math
import numbers
import pathlib
import re
from typing import Any, Literal

from jaxcp.data.sources import BatchSource, TokenFiles, WholeSource
from jaxcp.layout import Zigzag
from jaxcp.mesh import MeshConfig
from jaxcp.sharding import Rules
from jaxcp.training.context import ContextStage, check_order, runs_of


def _whole(config: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), numbers.Integral):
            raise ValueError(f"{name} must be an integer; got {name}={getattr(config, name)!r}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive; got {name}={getattr(config, name)}")


def _local(name: str, folder: str | pathlib.Path) -> None:
    # Path("gs://a") is "gs:/a", a folder here that nobody asked for
    if re.match(r"\w{2,}:/", str(folder)):
        raise ValueError(
            f"{name} must be a folder of a file system, as renaming, appending and fsync need it; "
            f"got {name}={str(folder)!r}. Mount the bucket (gcsfuse, mountpoint-s3), or copy"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for everything, or Muon for the matrices inside layers where `muon_learning_rate` is
    given. Both rates follow one schedule: linear warm-up, level, decay over the last
    `decay_fraction` of the steps to `final_fraction` of the peak. A fraction below 1 is WSD
    (warm-up, stable, decay); 0 never decays.

    `clip_norm` is the greatest norm of the whole gradient; None does not clip. Weight decay is
    times the learning rate; biases and scales of norms have none.

    Raises:
      ValueError: a rate or eps that is not positive, a fraction outside of [0, 1].
    """

    learning_rate: float = 6e-4
    muon_learning_rate: float | None = None
    warmup_steps: int = 100
    decay: Literal["cosine", "linear", "sqrt"] = "cosine"
    """The form of the decay; "sqrt" is 1 - sqrt(x) of the way down."""
    decay_fraction: float = 1.0
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    """Momentum of Muon."""
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    router_bias_rate: float = 1e-3
    """The amount by which a step raises (lowers) the selection bias of an expert that is chosen too
    seldom (too often). Source: DeepSeek-V3 (arXiv 2412.19437)."""

    def __post_init__(self):
        _positive(self, "learning_rate", "eps")
        if self.muon_learning_rate is not None:
            _positive(self, "muon_learning_rate")
        if self.clip_norm is not None:
            _positive(self, "clip_norm")
        for name in ("warmup_steps", "weight_decay", "router_bias_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0; got {name}={getattr(self, name)}")
        for name in ("decay_fraction", "final_fraction", "beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {name}={getattr(self, name)}")
        if self.decay not in ("cosine", "linear", "sqrt"):
            raise ValueError(
                f"decay must be 'cosine', 'linear' or 'sqrt'; got decay={self.decay!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses beside that of next tokens; 0 leaves a loss out of the program.

    No loss depends on the mesh. Records show the losses without their weights.

    All are means over the whole batch, in any number of pieces (`accumulate`) but for the balance
    loss: its load and mean probabilities are those of a piece, and it is the mean over pieces by
    their tokens.
    """

    balance_loss_weight: float = 0.0
    """Weight of `RouterStats.balance_loss`; Switch has 0.01, Qwen3-MoE 0.001 times k."""
    z_loss_weight: float = 0.0
    """Weight of `RouterStats.z_loss`; ST-MoE has 0.001."""
    mtp_loss_weight: float = 0.3
    """Weight of the mean cross-entropy of drafts, in a model with an MTP layer. DeepSeek-V3 has
    0.3, and 0.1 in the last third. Source: arXiv 2412.19437."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < math.inf:
                raise ValueError(
                    f"{field.name} must be >= 0; got {field.name}={getattr(self, field.name)}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The place where a run begins, if not at random weights: at most one of two.

    Raises:
      ValueError: both; a run without its step.
    """

    weights: str | None = None
    """A checkpoint folder, of ours or of anybody's that `load` reads: the weights of step 0."""
    run: str | None = None
    """The folder of another run, whose whole state at `step` this one goes on from."""
    step: int | None = None

    def __post_init__(self):
        if self.weights is not None and self.run is not None:
            raise ValueError(f"a run starts from weights or from a run; got both: {self}")
        if self.run is not None:
            _local("run", self.run)
        if (self.run is None) != (self.step is None):
            raise ValueError(f"a run to start from and its step go together; got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Texts that the model writes during a run, for a person to look at.

    They need a source whose tokenizer is known. No number of the run depends on them.
    """

    every: int | None = None
    """Steps between them; None for none."""
    prompt: str = "\n"
    tokens: int = 100
    temperature: float = 0.8
    """0 takes the likeliest token each time."""

    def __post_init__(self):
        _whole(self, "tokens", *["every"] * (self.every is not None))
        _positive(self, "tokens", *["every"] * (self.every is not None))
        if not 0 <= self.temperature < math.inf or not self.prompt:
            raise ValueError(f"samples need a prompt and a temperature >= 0; got {self}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. The model computes in `model.dtype` and recomputes layers in the backward
    pass where `model.remat` is set; parameters and optimizer state are float32.

    Raises:
      ValueError: a size below 1; rows that `accumulate` x `mesh.data` does not divide; rows longer
        than the model has positions, in any stage; a stage that changes a rotary base of a model
        without; data that is neither a glob nor a source; an `out_dir` on an object store.

    >>> config = jaxcp.TrainConfig(
    ...     model=jaxcp.GPTConfig(...), seq_len=1024, batch_size=8, steps=1000,
    ...     data="corpus/*.bin", out_dir="runs/first", mesh=jaxcp.MeshConfig(seq=8),
    ... )
    >>> jaxcp.train(config).final_loss
    """

    model: Any
    """A config of any family, such as `GPTConfig`."""
    seq_len: int
    """Tokens of a row, targets not counted; any number, the layout pads."""
    batch_size: int
    """Rows of an optimizer step, over all devices and all accumulated pieces."""
    steps: int
    """Optimizer steps of the whole run: the length of the schedule."""
    data: str | BatchSource
    """A folder that `jaxcp prepare` wrote, a glob of token files, or a source (`TokenFiles`,
    `TextSource`, `Mixture`, your own)."""
    out_dir: str | pathlib.Path
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rules: Rules = dataclasses.field(default_factory=Rules)
    """The mesh axis of each logical axis of a parameter, such as `Rules(experts="seq")`."""
    zero: Literal[0, 1, 3] = 0
    """The stage of ZeRO (arXiv 1910.02054): what is cut over `data` and `seq`, where parameters are
    the same on all devices. 1: optimizer state, and gradients once they are summed. 3 (FSDP):
    parameters too, which layers gather one at a time. No number of a run depends on it."""
    strategy: Any = None
    """A strategy such as `Ring()`; None leaves the choice to the model."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    start: StartConfig = dataclasses.field(default_factory=StartConfig)
    extended: tuple[int, ...] = ()
    """Former `steps` of a run that was made longer: at each its schedule began anew."""
    context: tuple[ContextStage, ...] = ()
    """Stages in which rows are longer than `seq_len`; each compiles once. `batch_size` stays."""
    eval_every: int | None = None
    """Steps between evaluations, each over all of `eval_data`; the last step has one too."""
    eval_data: str | BatchSource | None = None
    """A source that can be gone through (`TokenFiles`, `TextSource`); None takes the validation
    part of a prepared folder."""
    samples: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    accumulate: int = 1
    """Pieces a batch is cut into, whose gradients are summed before one update."""
    seed: int = 0
    stop_after: int | None = None
    """Stop (and save) after this step of `steps`; run again with more, or None, to go on."""
    max_seconds: float = math.inf
    """Stop (and save) after so many seconds in `train`, compilation included."""
    checkpoint_every: int = 1000
    keep: int = 2
    """Checkpoints that stay; older ones are deleted."""
    keep_every: int | None = None
    """Checkpoints of steps that this divides stay too."""
    max_skipped: int = 10
    """A step whose gradients are not finite changes nothing; so many in a row end the run."""
    keep_programs: bool = True
    """Compiled programs stay in `out_dir/xla_cache`, where the process has no such cache yet."""
    log_every: int = 10
    loss_chunk: int = 1024
    """Tokens whose logits a device holds at once."""

    def __post_init__(self):
        counts = ["seq_len", "batch_size", "steps", "accumulate", "checkpoint_every", "keep"]
        counts += ["log_every", "loss_chunk"] + ["stop_after"] * (self.stop_after is not None)
        counts += ["eval_every"] * (self.eval_every is not None)
        counts += ["max_skipped"] + ["keep_every"] * (self.keep_every is not None)
        _whole(self, *counts, "seed")
        _positive(self, *counts, "max_seconds")
        pieces = self.accumulate * self.mesh.data
        if self.batch_size % pieces:
            raise ValueError(
                f"batch_size must divide by accumulate x mesh.data = {self.accumulate} x "
                f"{self.mesh.data}; got batch_size={self.batch_size}"
            )
        if not isinstance(self.data, str | BatchSource):
            raise ValueError(
                "data must be a glob of token files or an object with batch(step, rows, length); "
                f"got {self.data!r}"
            )
        _local("out_dir", self.out_dir)
        if self.zero not in (0, 1, 3):
            raise ValueError(
                "zero must be 0, 1 or 3; stage 2 would be 1, whose accumulated gradients are cut "
                f"already. Got zero={self.zero!r}"
            )
        self._check_evaluation()
        ends = (*self.extended, self.steps)
        if list(ends) != sorted(set(ends)) or ends[0] < 1:
            raise ValueError(f"extended must ascend to steps={self.steps}; got {self.extended}")
        if getattr(self.model, "num_mtp_layers", 0) and not self.losses.mtp_loss_weight:
            raise ValueError(
                "an MTP layer without a loss would only decay: set mtp_loss_weight > 0, "
                "or num_mtp_layers=0; got mtp_loss_weight=0"
            )
        limit = getattr(self.model, "max_positions", self.seq_len)
        if self.seq_len > limit:
            raise ValueError(
                f"the model has {limit} positions; got seq_len={self.seq_len}. Raise max_positions"
            )
        if self.context:
            check_order(self.seq_len, self.context, self.steps)
            _ = self.stages  # each is checked as a run is
        self._check_pieces()

    def _check_pieces(self) -> None:
        """Refuse rows that a layout would fill up, where layers go by the order of tokens."""
        layout = getattr(self.strategy, "layout", Zigzag())
        pieces = layout.pieces * self.mesh.seq
        if getattr(self.model, "recurrent", False) and self.mesh.seq > 1 and self.seq_len % pieces:
            raise ValueError(
                f"a model with recurrent layers needs seq_len to divide by {pieces}, the pieces of "
                f"{layout} over seq={self.mesh.seq}; got seq_len={self.seq_len}"
            )

    def _check_evaluation(self) -> None:
        if self.eval_every is None or isinstance(self.eval_data, str | WholeSource):
            return
        if self.eval_data is None and isinstance(self.data, str | TokenFiles):
            return  # whether it is a prepared folder, the run will see
        raise ValueError(
            "eval_every needs eval_data that can be gone through from beginning to end, such as "
            f"TokenFiles or TextSource; got eval_data={self.eval_data!r}"
        )

    @property
    def gathered_to(self) -> Rules | None:
        """The rules of whole parameters, where those of a state lie in parts."""
        return self.rules if self.zero == 3 else None

    @property
    def cycles(self) -> tuple[int, ...]:
        """The ends of the cycles of the schedule: one, but for a run that was made longer."""
        return (*self.extended, self.steps)

    @functools.cached_property
    def stages(self) -> "dict[int, TrainConfig]":
        """The run as it is in each stage of its context, by the steps done when that begins."""
        return runs_of(self)

    def begun(self, step: int) -> int:
        """Count the steps that were done when the stage of step `step` (from 1 on) began."""
        return max((stage.step for stage in self.context if stage.step < step), default=0)

    def at(self, step: int) -> "TrainConfig":
        """The run as it is in step `step`, from 1 on: with the rows and the model of its stage."""
        return self.stages[self.begun(step)] if self.context else self
