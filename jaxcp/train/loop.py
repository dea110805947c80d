# SPDX-License-Identifier: Apache-2.0
"""The training run: one jitted step over a donated state, saved and resumed on its own."""

import dataclasses
import functools
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcp.layout import Zigzag
from jaxcp.models import family_of
from jaxcp.sharding import place
from jaxcp.train import checkpoint
from jaxcp.train.config import OptimizerConfig, TrainConfig, differences, identity
from jaxcp.train.data import as_source, checked, prefetch, put
from jaxcp.train.loss import chunked_cross_entropy
from jaxcp.train.metrics import Callback, MetricsFile, ProgressBar, Record
from jaxcp.train.optimizer import make_optimizer, schedule

logger = logging.getLogger(__name__)

State = dict[str, Any]
"""`params` and `others` (variables without a gradient), flat dicts by name; `opt_state`; `step`,
which is the position in the data too; `rng`, the key of the run (no layer draws from it yet)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left: `model` holds the final parameters on the mesh of the run."""

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
      progress: draw a progress bar on stderr.
    Raises:
      ValueError: `out_dir` holds another run, naming the fields that differ; a mesh that the
        devices cannot make; data that is missing, broken or out of the vocabulary.
      FloatingPointError: the loss is not finite. The checkpoint before stays the newest.
    """
    mesh = config.mesh.make(jax.devices()[: config.mesh.size])
    claim(config)
    with jax.set_mesh(mesh):
        return _Run(config, mesh).go((*callbacks, ProgressBar()) if progress else callbacks)


def claim(config: TrainConfig) -> None:
    """Write into `out_dir/config.json` whose checkpoints these are, or check that they are ours."""
    path = pathlib.Path(config.out_dir) / "config.json"
    ours = identity(config)
    if path.exists():
        lines = differences(json.loads(path.read_text()), ours)
        if lines:
            raise ValueError(
                f"{path.parent} holds a run with another configuration: {'; '.join(lines)}. "
                "Use another out_dir, or set these back to resume"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name("config.json.new")
    fresh.write_text(json.dumps(ours, indent=1))
    fresh.replace(path)


class _Run:
    def __init__(self, config: TrainConfig, mesh: jax.sharding.Mesh):
        self.config, self.mesh = config, mesh
        self.out_dir = pathlib.Path(config.out_dir)
        self.checkpoints = self.out_dir / "checkpoints"
        self.layout = getattr(config.attention, "layout", Zigzag())
        self.source = as_source(config.data, config.seed)
        self.began = time.perf_counter()

    def go(self, callbacks: tuple[Callback, ...]) -> Result:
        config = self.config
        state = init_state(config)
        restored = checkpoint.restore(self.checkpoints, state)
        start = 0
        if restored is not None:
            start, state = restored
            logger.info("resumed from step %d in %s", start, self.checkpoints)
        metrics = MetricsFile(self.out_dir / "metrics.jsonl", resumed_at=start)
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
            seconds=time.perf_counter() - self.began,
            metrics_path=metrics.path,
            checkpoint_path=self.checkpoints / str(step),
            model=join(config.model, state),
        )

    def loop(self, state, start, end, metrics, callbacks) -> State:
        config = self.config
        train_step = make_step(
            config.model, config.attention, config.optimizer, config.steps, config.loss_chunk
        )
        tokens = metrics.records[-1]["tokens"] if metrics.records else 0
        timed_from = None
        for step, (batch, count) in enumerate(prefetch(self.batch, start, end), start + 1):
            state, out = train_step(state, batch)
            tokens += count
            seconds = time.perf_counter() - self.began
            last = step == end or seconds >= config.max_seconds
            save = last or step % config.checkpoint_every == 0
            if save or step % config.log_every == 0:
                record: Record = {"step": step} | {key: float(value) for key, value in out.items()}
                self.check_finite(record)
                now = time.perf_counter()
                speed = (
                    None if timed_from is None else (tokens - timed_from[1]) / (now - timed_from[0])
                )
                record |= {
                    "tokens": tokens,
                    "tokens_per_second": speed,
                    "seconds": now - self.began,
                }
                if save:
                    checkpoint.save(self.checkpoints, step, state, keep=config.keep)
                metrics.write(record)
                for callback in callbacks:
                    callback.log(record)
            if timed_from is None or save or step % config.log_every == 0:
                jax.block_until_ready(
                    out
                )  # so that neither compiling nor saving counts as training
                timed_from = time.perf_counter(), tokens
            if last:
                break
        return state

    def check_finite(self, record: Record) -> None:
        if not math.isfinite(record["loss"]):
            raise FloatingPointError(
                f"the loss of step {record['step']} is {record['loss']}; lower the learning rate or "
                f"raise warmup_steps. {self.checkpoints} still holds the state before"
            )

    def batch(self, step: int):
        config = self.config
        host = checked(
            self.source.batch(step, config.batch_size, config.seq_len),
            vocab_size=config.model.vocab_size,
        )
        count = host["tokens"].size
        return put(host, mesh=self.mesh, layout=self.layout, accumulate=config.accumulate), count


class Skeleton(NamedTuple):
    """A model without its arrays."""

    names: tuple[str, ...]
    learnt: frozenset[str]
    structure: jax.tree_util.PyTreeDef


@functools.lru_cache(maxsize=8)
def skeleton(model_config: Any) -> Skeleton:
    model = nnx.eval_shape(lambda: _new_model(model_config, 0))
    variables = _variables(model)
    learnt = frozenset(
        name for name, variable in variables.items() if isinstance(variable, nnx.Param)
    )
    return Skeleton(tuple(variables), learnt, jax.tree.structure(model))


def join(model_config: Any, state: State) -> Any:
    """The model with the arrays of a state."""
    bones = skeleton(model_config)
    arrays = state["params"] | state["others"]
    return jax.tree.unflatten(bones.structure, [arrays[name] for name in bones.names])


def init_state(config: TrainConfig) -> State:
    """A fresh state on the mesh in scope."""
    learnt = skeleton(config.model).learnt
    arrays = {
        name: v.get_value()
        for name, v in _variables(place(_new_model(config.model, config.seed))).items()
    }
    params = {name: x.astype(jnp.float32) for name, x in arrays.items() if name in learnt}
    state = {
        "params": params,
        "others": {name: x for name, x in arrays.items() if name not in learnt},
        "opt_state": jax.jit(make_optimizer(config.optimizer, config.steps).init)(params),
        "step": jnp.int32(0),
        "rng": jax.random.key_data(jax.random.key(config.seed)),
    }
    return jax.tree.map(_on_mesh, state)


def _new_model(model_config: Any, seed: int) -> Any:
    return family_of(model_config).model_class(model_config, rngs=nnx.Rngs(seed))


def _variables(model: Any) -> dict[str, nnx.Variable]:
    leaves = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): variable
        for path, variable in leaves
    }


def _on_mesh(x: jax.Array) -> jax.Array:
    """What was made on one device becomes replicated; what has a sharding keeps it."""
    mesh = jax.sharding.get_mesh()
    if isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh:
        return x
    return jax.device_put(x, NamedSharding(mesh, P()))


@functools.lru_cache(maxsize=8)
def make_step(
    model_config: Any,
    attention: Any,
    optimizer_config: OptimizerConfig,
    steps: int,
    loss_chunk: int,
) -> Callable[[State, Any], tuple[State, dict]]:
    """`train_step(state, batch) -> (state, {"loss", "lr", "grad_norm"})`, jitted; donates `state`.

    `batch` leaves are `[accumulate, B, T]` as `data.put` makes them. Kept by its arguments, so that
    a run which goes on in the same process does not compile again.
    """
    optimizer = make_optimizer(optimizer_config, steps)
    rate = schedule(optimizer_config, optimizer_config.learning_rate, steps)

    def loss(params, state, piece):
        model = join(model_config, state | {"params": params})
        x, load = model.hidden(
            piece["tokens"],
            piece["positions"],
            segment_ids=piece.get("segment_ids"),
            attention=attention,
        )
        total, weight = chunked_cross_entropy(
            x, model.head_kernel(), piece["targets"], piece["weights"], chunk=loss_chunk
        )
        return total, (weight, load)

    def sums(state, batch):
        """Loss, weight, expert load and gradient, summed over the pieces."""
        grad = jax.value_and_grad(loss, has_aux=True)
        first = jax.tree.map(lambda x: x[0], batch)
        if batch["tokens"].shape[0] == 1:
            return grad(state["params"], state, first)

        def add(total, piece):
            return jax.tree.map(jnp.add, total, grad(state["params"], state, piece)), None

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad, state["params"], state, first))
        return jax.lax.scan(add, zeros, batch)[0]

    def step(state: State, batch) -> tuple[State, dict]:
        (total, (weight, load)), grads = sums(state, batch)
        weight = jnp.maximum(weight, 1e-9)
        grads = jax.tree.map(lambda g: g / weight, grads)
        # optax mixes int32 counts with floats, which strict promotion refuses
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
            lr = rate(state["step"])
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        others = state["others"]
        if load is not None:
            others = balance(others, load, optimizer_config.router_bias_rate)
        new = {
            "params": params,
            "others": others,
            "opt_state": opt_state,
            "step": state["step"] + 1,
        }
        return state | new, {"loss": total / weight, "lr": lr, "grad_norm": optax.tree.norm(grads)}

    return jax.jit(step, donate_argnums=0)


def balance(others: dict[str, jax.Array], load: jax.Array, rate: float) -> dict[str, jax.Array]:
    """Move the selection bias of every expert by `rate` towards even load (auxiliary-loss-free
    balancing, DeepSeek-V3, arXiv 2412.19437). `load` is `[moe layers, experts]`."""
    names = [name for name in others if name.endswith("router_bias")]  # in the order of the layers
    assert len(names) == load.shape[0], (names, load.shape)
    moved = {}
    for name, row in zip(names, load, strict=True):
        moved[name] = others[name] + rate * jnp.sign(row.mean() - row)
    return others | moved
