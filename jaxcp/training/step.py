# SPDX-License-Identifier: Apache-2.0
"""The state of a run and the one program that advances it."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcp.context_parallel.overlap import compiler_options
from jaxcp.layers.gather import gathered_late
from jaxcp.layers.parameter import drawn_in_parts
from jaxcp.layers.router_stats import RouterStats
from jaxcp.layers.stack import members
from jaxcp.layout import Zigzag
from jaxcp.models import family_of
from jaxcp.sharding import DEFAULT, Rules, sharding_of
from jaxcp.training import fixed_order
from jaxcp.training.config import LossConfig, OptimizerConfig, TrainConfig
from jaxcp.training.objective import Totals, objective, scales_of
from jaxcp.training.optimizer import Cycles, make_optimizer, schedule
from jaxcp.training.start import load_weights
from jaxcp.training.zero import Places, laid, places
from jaxcp.weights.placement import check, place

DRAFT_DTYPES = {
    "following": jnp.int32,
    "draft_targets": jnp.int32,
    "draft_weights": jnp.float32,
}
"""Leaves of a batch for MTP layers, `[accumulate, B, T, depth]` (`data.lookahead.draft_batch`)."""

NEXT_TOKENS = LossConfig()

ROUNDING = 1e-6
"""Bound on the distance from the mean, as a part of it, within which fractions summed in float32
count as even."""

State = dict[str, Any]
"""State of a run: `params` and `others` (variables without a gradient), flat dicts by name;
`opt_state`; `step`, which is the position in the data too; `rng`, the key of the run (no layer
draws from it yet)."""


class Skeleton(NamedTuple):
    """A model without its arrays."""

    names: tuple[str, ...]
    learnt: frozenset[str]
    axes: dict[str, tuple[str | None, ...]]
    """Logical axes of the learnt variables."""
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the learnt variables."""
    structure: jax.tree_util.PyTreeDef


@functools.lru_cache(maxsize=8)
def skeleton(model_config: Any) -> Skeleton:
    model = nnx.eval_shape(lambda: _new_model(model_config, 0))
    variables = _variables(model)
    learnt = frozenset(
        name for name, variable in variables.items() if isinstance(variable, nnx.Param)
    )
    axes = {name: _axes(variables[name]) for name in variables if name in learnt}
    shapes = {name: variables[name].shape for name in variables if name in learnt}
    return Skeleton(tuple(variables), learnt, axes, shapes, jax.tree.structure(model))


def join(model_config: Any, state: State, rules: Rules | None = None) -> Any:
    """Build the model with the arrays of a state.

    Args:
      rules: of a state whose parameters lie in parts, what they are gathered to: most of them by
        the block that reads them (`layers.gather`).
    """
    bones = skeleton(model_config)
    arrays = state["params"] | state["others"]
    model = jax.tree.unflatten(bones.structure, [arrays[name] for name in bones.names])
    return model if rules is None else gathered_late(model, rules, model_config.dtype)


def _joined(model_config: Any, state: State, params: Any) -> Any:
    return join(model_config, state | {"params": params})


def places_of(config: TrainConfig) -> Places:
    """Say where the parameters of a run lie on the mesh in scope."""
    mesh = jax.sharding.get_abstract_mesh().shape
    return _places(config.model, config.zero, config.rules, mesh)


def _places(model_config: Any, zero: int, rules: Rules, mesh: Any) -> Places:
    bones = skeleton(model_config)
    return places(zero, rules, bones.axes, bones.shapes, mesh)


def init_state(config: TrainConfig) -> State:
    """Make a fresh state on the mesh in scope, with random weights or those of a checkpoint.

    Raises:
      ValueError: the checkpoint of `config.start.weights` is of another model, or none.
    """
    learnt, axes = skeleton(config.model).learnt, skeleton(config.model).axes
    where = places_of(config)
    if config.start.weights is None:
        with drawn_in_parts(config.rules):
            model = _new_model(config.model, config.seed)
        check(model, config.rules)
        # parts stay parts until it is known which of them a device keeps
        model = model if config.zero == 3 else place(model, rules=config.rules)
    else:
        model = load_weights(config.model, config.start.weights, rules=config.rules)
    arrays = {name: v.get_value() for name, v in _variables(model).items()}
    params = {name: x.astype(jnp.float32) for name, x in arrays.items() if name in learnt}
    updated = laid(params, where.updated)
    state = {
        "params": laid(updated if config.zero == 3 else params, where.params),
        "others": {name: x for name, x in arrays.items() if name not in learnt},
        "opt_state": jax.jit(make_optimizer(config.optimizer, config.cycles, axes).init)(updated),
        "step": jnp.int32(0),
        "rng": jax.random.key_data(jax.random.key(config.seed)),
    }
    return jax.tree.map(_on_mesh, state)


def abstract_inputs(config: TrainConfig, mesh: Mesh) -> tuple[State, dict[str, Any]]:
    """The shapes and shardings of a state and a batch on `mesh`, whose devices need not be there.

    `jaxcp.compile.compile_for` takes these and `make_step`'s function.
    """
    abstract_mesh = mesh.abstract_mesh
    where = _places(config.model, config.zero, config.rules, mesh.shape)

    def leaf(shape, dtype, spec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(abstract_mesh, spec))

    def fresh(params):
        key = jax.random.key_data(jax.random.key(config.seed))
        axes = skeleton(config.model).axes
        optimizer = make_optimizer(config.optimizer, config.cycles, axes)
        return {"opt_state": optimizer.init(params), "step": jnp.int32(0), "rng": key}

    shapes = skeleton(config.model).shapes
    params, updated = (
        {name: leaf(shapes[name], jnp.float32, specs[name]) for name in shapes} for specs in where
    )
    model = nnx.eval_shape(lambda: _new_model(config.model, config.seed))
    others = {
        name: leaf(variable.shape, variable.dtype, sharding_of(variable, config.rules))
        for name, variable in _variables(model).items()
        if name not in shapes
    }
    with jax.sharding.use_abstract_mesh(abstract_mesh):
        state = jax.eval_shape(fresh, updated) | {"params": params, "others": others}
    layout = getattr(config.strategy, "layout", Zigzag())
    length = layout.padded_length(config.seq_len, mesh.shape["seq"])
    shape = (config.accumulate, config.batch_size // config.accumulate, length)
    dtypes = dict.fromkeys(("tokens", "targets", "positions"), jnp.int32) | {"weights": jnp.float32}
    if layout.by_segment:
        dtypes["segment_ids"] = jnp.int32
    batch = {name: leaf(shape, x, P(None, "data", "seq")) for name, x in dtypes.items()}
    if depth := getattr(config.model, "num_mtp_layers", 0):
        for name, dtype in DRAFT_DTYPES.items():
            batch[name] = leaf((*shape, depth), dtype, P(None, "data", "seq"))
    if (width := getattr(config.model, "ngram_width", 1)) > 1:
        batch["tokens"] = leaf((*shape, width), jnp.int32, P(None, "data", "seq"))
    return state, batch


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


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    return tuple(variable.get_metadata().get("axes") or (None,) * len(variable.shape))


def _on_mesh(x: jax.Array) -> jax.Array:
    """Replicate an array that lies on one device; one on the mesh keeps its sharding."""
    mesh = jax.sharding.get_mesh()
    if isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh:
        return x
    return jax.device_put(x, NamedSharding(mesh, P()))


@functools.lru_cache(maxsize=8)
def make_step(
    model_config: Any,
    strategy: Any,
    optimizer_config: OptimizerConfig,
    steps: Cycles,
    loss_chunk: int,
    consecutive: bool = False,
    losses: LossConfig = NEXT_TOKENS,
    zero: int = 0,
    rules: Rules = DEFAULT,
) -> Callable[[State, Any], tuple[State, dict]]:
    """Make `train_step(state, batch) -> (state, record)`, jitted, which donates `state`.

    The record has "loss" (of next tokens), "lr", "grad_norm", the other `losses` under their names
    in `objective`, "skipped" and, for a model with experts, the entries of `routing_health`.

    Where the loss or the norm of the gradient is not finite the step is skipped: the new state is
    the old one, but for the counts of steps that place it in the data and in the schedule.

    `batch` leaves are `[accumulate, B, T]` as `data.placing.put` makes them, and `consecutive` is
    the answer of `data.sources.consecutive`. `zero` and, where it is not 0, `rules` are those of
    the run: they say where the state lies. The function is cached by its arguments, so a run that
    goes on in the same process does not compile again.
    """
    optimizer = make_optimizer(optimizer_config, steps, skeleton(model_config).axes)
    rate = schedule(optimizer_config, optimizer_config.learning_rate, steps)
    options = {"strategy": strategy, "consecutive": consecutive, "chunk": loss_chunk}

    def loss(params, state, piece, scales):
        model = join(model_config, state | {"params": params}, rules if zero == 3 else None)
        return objective(model, piece, losses, scales=scales, **options)

    def gradient(state, piece, scales):
        mesh = jax.sharding.get_abstract_mesh().shape
        if not zero and fixed_order.fits(strategy, model_config, mesh):
            model = functools.partial(_joined, model_config, state)
            return fixed_order.gradient(model, state["params"], piece, strategy, loss_chunk)
        return jax.grad(loss, has_aux=True)(state["params"], state, piece, scales)

    def lie(tree, specs):
        return laid(tree, specs) if zero else tree

    def step(state: State, batch) -> tuple[State, dict]:
        where = _places(model_config, zero, rules, jax.sharding.get_abstract_mesh().shape)
        grads, totals = _sums(gradient, state, batch, lambda grads: lie(grads, where.updated))
        weight = jnp.maximum(totals.weight, 1e-9)
        grads = jax.tree.map(lambda g: g / weight, grads)
        # optax mixes int32 counts with floats, which strict promotion refuses
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
            lr = rate(state["step"])
            params = lie(state["params"], where.updated)
            updates, opt_state = optimizer.update(grads, state["opt_state"], params)
            params = lie(optax.apply_updates(params, updates), where.params)
        others, health = state["others"], {}
        if totals.stats is not None:
            health = routing_health(totals.stats)
            others = balance(others, totals.stats.counts, optimizer_config.router_bias_rate)
        record = {name: total / weight for name, total in totals.parts.items()}
        record |= {"lr": lr, "grad_norm": optax.tree.norm(grads)}
        finite = jnp.isfinite(record["loss"] + record["grad_norm"])
        record["skipped"] = 1 - finite.astype(jnp.int32)
        new = {"params": params, "others": others, "opt_state": opt_state}
        new = _where(finite, new, {name: state[name] for name in new})
        new["step"] = state["step"] + 1
        return state | new, record | health

    exact = fixed_order.OPTIONS if strategy is not None and strategy.same_bits else {}
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options() | exact)


def _sums(gradient: Callable, state: State, batch: Any, lie: Callable) -> tuple[Any, Totals]:
    """Sum the gradient, which `lie` lays where it belongs, and the `Totals` over the pieces."""
    scales = scales_of(batch)

    def of_piece(state, piece):
        grads, totals = gradient(state, piece, scales)
        return lie(grads), totals

    first = jax.tree.map(lambda x: x[0], batch)
    if batch["tokens"].shape[0] == 1:
        return of_piece(state, first)

    def add(total, piece):
        return jax.tree.map(jnp.add, total, of_piece(state, piece)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_piece, state, first))
    return jax.lax.scan(add, zeros, batch)[0]


def _where(finite: jax.Array, new: Any, old: Any) -> Any:
    """Take the new arrays or the old ones, and the schedule's counts of steps in any case."""

    def counts(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def choose(a: Any, b: Any) -> Any:
        return a if counts(a) else jnp.where(finite, a, b)

    return jax.tree.map(choose, new, old, is_leaf=counts)


def routing_health(stats: RouterStats) -> dict[str, jax.Array]:
    """Measure how evenly experts are used, from `stats` of all MoE layers and pieces of a batch.

    `router_load`: `[moe layers, experts]`, the load over the mean one (1: even).

    `router_load_max`: the busiest expert's load over the mean one, in the layer where it is
    largest (1: even). `router_entropy`: entropy of the choices over that of even ones, in the layer
    where it is smallest (1: even, 0: one expert takes all). `router_idle`: the fraction of experts
    in all layers that no token chose. `router_flips`: the fraction of choices in all layers that
    the selection bias made (`RouterStats.flips`).
    """
    share, experts = stats.load, stats.counts.shape[-1]
    flips, choices = (jnp.asarray(x, jnp.float32).sum() for x in (stats.flips, stats.counts))
    entropy = jax.scipy.special.entr(share).sum(-1) / max(math.log(experts), 1e-9)
    return {
        "router_load": share * experts,
        "router_flips": flips / jnp.maximum(choices, 1),  # a batch may be all pads
        "router_load_max": share.max() * experts,
        "router_entropy": entropy.min(),
        "router_idle": jnp.mean((stats.counts == 0).astype(jnp.float32)),
    }


@jax.named_scope("balance")
def balance(others: dict[str, jax.Array], counts: jax.Array, rate: float) -> dict[str, jax.Array]:
    """Move the selection bias of every expert by `rate` towards even load (auxiliary-loss-free
    balancing, DeepSeek-V3, arXiv 2412.19437), and that of one with the mean load not at all.

    `counts` is `[moe layers, experts]`, choices or their fractions; layers whose router has no such
    bias (DeepSeek-V4's, which choose by token id) come first.
    """
    biases = {name: members(name) for name in others if name.endswith("router_bias")}
    layers = sorted((x for own in biases.values() for x in own), key=_layers_by_number)
    assert len(layers) <= counts.shape[0], (layers, counts.shape)
    first = counts.shape[0] - len(layers)
    moved = {}
    for name, own in biases.items():
        rows = counts[jnp.asarray([first + layers.index(layer) for layer in own])]
        steps = jax.vmap(_below_mean)(rows).reshape(others[name].shape)
        moved[name] = others[name] + rate * steps
    return others | moved


def _below_mean(counts: jax.Array) -> jax.Array:
    """Compare `counts [E]` with their mean: 1 below, 0 at, -1 above it. Exact for integers."""
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        mean = counts.mean()
        even = jnp.abs(mean - counts) <= ROUNDING * mean
        return jnp.where(even, 0.0, jnp.sign(mean - counts))
    # The sum of all counts, or a count times E, may pass int32: mean and rest are put together
    # from quotients and remainders.
    experts = counts.shape[0]
    rests = (counts % experts).sum()
    mean, rest = (counts // experts).sum() + rests // experts, rests % experts
    return jnp.sign(jnp.where(counts == mean, rest, mean - counts)).astype(jnp.float32)


def _layers_by_number(name: str) -> list[str]:
    """A sort key by layer number: jit orders a dict by the alphabet, layer 10 before layer 2."""
    return [part.zfill(8) if part.isdigit() else part for part in name.split(".")]
