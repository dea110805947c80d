# SPDX-License-Identifier: Apache-2.0
"""Configuration of a training run: frozen values, checked when made; a run is a Python file."""

import dataclasses
import importlib.util
import math
import numbers
import pathlib
import re
from typing import Any, Literal

from jaxcp.data.sources import BatchSource
from jaxcp.mesh import MeshConfig
from jaxcp.sharding import Rules


def _whole(config: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), numbers.Integral):
            raise ValueError(f"{name} must be an integer; got {name}={getattr(config, name)!r}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive; got {name}={getattr(config, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for everything, or Muon for the matrices inside layers where `muon_learning_rate` is
    given. Both rates follow one schedule: linear warm-up, level, decay over the last
    `decay_fraction` of the steps to `final_fraction` of the peak.

    `clip_norm` is the greatest norm of the whole gradient; None does not clip. Weight decay is
    times the learning rate; biases and scales of norms have none.

    Raises:
      ValueError: a rate or eps that is not positive, a fraction outside of [0, 1].
    """

    learning_rate: float = 6e-4
    muon_learning_rate: float | None = None
    warmup_steps: int = 100
    decay: Literal["cosine", "linear"] = "cosine"
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
        if self.decay not in ("cosine", "linear"):
            raise ValueError(f"decay must be 'cosine' or 'linear'; got decay={self.decay!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses beside that of next tokens; 0 leaves a loss out of the program.

    No loss depends on the mesh. Records show the losses without their weights.

    With `accumulate`, the load and mean probabilities of the balance loss are those of a piece, and
    the routers' losses are the mean over pieces, weighted as their targets are. The MTP loss is
    that of the whole batch in any case.
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
class TrainConfig:
    """One training run. The model computes in `model.dtype` and recomputes layers in the backward
    pass where `model.remat` is set; parameters and optimizer state are float32.

    Raises:
      ValueError: a size below 1; rows that `accumulate` x `mesh.data` does not divide; rows longer
        than the model has positions; data that is neither a glob nor a source.

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
    """A glob of `.bin` token files, or a source (`TokenFiles`, `TextSource`, your own)."""
    out_dir: str | pathlib.Path
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rules: Rules = dataclasses.field(default_factory=Rules)
    """The mesh axis of each logical axis of a parameter, such as `Rules(experts="seq")`."""
    strategy: Any = None
    """A strategy such as `Ring()`; None leaves the choice to the model."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
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
    log_every: int = 10
    loss_chunk: int = 1024
    """Tokens whose logits a device holds at once."""

    def __post_init__(self):
        counts = ["seq_len", "batch_size", "steps", "accumulate", "checkpoint_every", "keep"]
        counts += ["log_every", "loss_chunk"] + ["stop_after"] * (self.stop_after is not None)
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


def identity(config: TrainConfig) -> dict[str, Any]:
    """List what decides the numbers of a run, as JSON values.

    A checkpoint may only be continued by a config that agrees on these. Mesh, rules, strategy,
    logging and saving may change.
    """
    how = ("remat", "reproducible_experts")
    model = {key: value for key, value in _plain(config.model).items() if key not in how}
    names = ["seq_len", "batch_size", "steps", "data", "optimizer", "seed"]
    if config.losses != LossConfig():  # runs from before there were any may go on
        names.append("losses")
    return {"model": model} | {name: _plain(getattr(config, name)) for name in names}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """List `field: old -> new` for each leaf on which two identities differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def load_run(path_or_name: str | pathlib.Path) -> TrainConfig:
    """Load the run of a Python file with `def config() -> TrainConfig`.

    Takes a path, or the name of a file in `configs/` of the working directory or, if there is none,
    among the runs that jaxcp ships.

    Raises:
      ValueError: no such file, naming those that exist; or a file without `config()`.
    """
    folders = [pathlib.Path("configs"), pathlib.Path(__file__).parents[1] / "configs"]
    candidates = [
        pathlib.Path(path_or_name),
        *(folder / f"{path_or_name}.py" for folder in folders),
    ]
    path = next((p for p in candidates if p.suffix == ".py" and p.is_file()), None)
    if path is None:
        names = sorted({p.stem for folder in folders for p in folder.glob("[!_]*.py")})
        raise ValueError(
            f"no run {str(path_or_name)!r}: give a path to a .py file or one of {names}"
        )
    spec = importlib.util.spec_from_file_location(f"jaxcp_run_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "config"):
        raise ValueError(f"{path} must define config() -> TrainConfig")
    run = module.config()
    if not isinstance(run, TrainConfig):
        raise ValueError(f"config() of {path} must return a TrainConfig; got {type(run).__name__}")
    return run


def _plain(value: Any) -> Any:
    """Convert to JSON values: dataclasses by fields and type, others by repr less addresses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__} | fields
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
