# SPDX-License-Identifier: Apache-2.0
"""AdamW, or Muon for the matrices inside layers and AdamW for the rest.

Parameters are a flat dict from names (`layers.0.attention.q`) to arrays. Logical axes decide which
matrix a weight is: its shape cannot (`q` and an expert's `gate` both have three axes), nor its name
(the `k` of an indexer has two axes, the `k` of attention three).
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxcp.training.config import OptimizerConfig

Params = dict[str, jax.Array]
Axes = tuple[str | None, ...]
Cycles = int | tuple[int, ...]

SIDES = (
    ("heads", "head_dim"),  # q [D, N, H] is the matrix [D, N*H], o [N, H, D] is [N*H, D]
    ("kv_heads", "head_dim"),
    ("group_heads", "head_dim"),
    ("index_heads", "head_dim"),
    ("head_groups", "latent"),
    ("window", "ngram"),  # the projection of an n-gram embedding, [W, C, D], is [W*C, D]
    ("parts", "embed"),
)
"""Pairs of axes that make one side of a matrix; every other axis is a side by itself."""

NUMBERED = ("experts", "choices", "head_groups", "vocab", "positions", "places", "mixes")
"""First axes that number matrices or vectors: `gate [E, D, F]` is a matrix for each expert."""

TABLES = ("vocab", "positions", "mixes")
"""Axes of `NUMBERED` whose vectors decay; those of the others are biases."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def sides(axes: Axes) -> tuple[int, list[int]]:
    """Count the leading axes that number matrices or vectors, and the axes of each side.

    A vector has one side, a matrix two, of which a product sums over the first.
    """
    if axes[:1] == ("layers",):
        numbered, lengths = sides(axes[1:])
        return numbered + 1, lengths
    numbered, lengths, at = 0, [], 0
    while at < len(axes):
        together = axes[at : at + 2] in SIDES
        if at == 0 and axes[0] in NUMBERED and not together:
            numbered = 1
        else:
            lengths.append(2 if together else 1)
        at += 2 if together else 1
    return numbered, lengths


def is_matrix(axes: Axes) -> bool:
    """Tell whether Muon takes a weight of these axes: a matrix, neither embedding nor head."""
    return "vocab" not in axes and len(sides(axes)[1]) == 2


def decays(axes: Axes) -> bool:
    """Tell whether weight decay applies: to matrices and tables, not to norms and biases (`q_bias`
    is `[N, H]`, an expert's `[E, F]`)."""
    axes = axes[1:] if axes[:1] == ("layers",) else axes
    numbered, lengths = sides(axes)
    return len(lengths) > 1 or bool(numbered and lengths and axes[0] in TABLES)


def schedule(config: OptimizerConfig, peak: float, cycles: Cycles) -> optax.Schedule:
    """Make the schedule: up to `peak`, level, down to `final_fraction * peak` at the end.

    Args:
      cycles: the step at which it ends, or several: at each but the last all begins anew, with a
        warm-up from the rate that the one before has ended with.
    """
    ends = (cycles,) if isinstance(cycles, int) else cycles
    rates: list[optax.Schedule] = []
    boundaries: list[int] = []
    for start, end in zip((0, *ends), ends, strict=False):
        rates += _cycle(config, peak, end - start, again=start > 0)
        warmup, decay = _lengths(config, end - start)
        boundaries += [*[start][: start > 0], start + warmup, end - decay]
    return optax.join_schedules(rates, boundaries)


def in_words(config: OptimizerConfig, cycles: Cycles) -> str:
    """Describe the last cycle of a schedule in a line."""
    before, end = (0, cycles) if isinstance(cycles, int) else ((0, *cycles)[-2], cycles[-1])
    warmup, decay = _lengths(config, end - before)
    first = config.final_fraction * config.learning_rate if before else 0.0
    down = "" if decay <= 1 else f", {config.decay} decay from step {end - decay:,} to "
    down += f"{config.final_fraction * config.learning_rate:.3g}" if down else ""
    return (
        f"learning rate, steps {before:,} to {end:,}: from {first:.3g} to "
        f"{config.learning_rate:.3g} in {warmup:,} steps{down}"
    )


def _lengths(config: OptimizerConfig, steps: int) -> tuple[int, int]:
    """Count the steps of the warm-up and of the decay, of so many in all."""
    warmup = min(config.warmup_steps, steps)
    return warmup, min(max(1, round(config.decay_fraction * steps)), max(1, steps - warmup))


def _cycle(config: OptimizerConfig, peak: float, steps: int, again: bool) -> list[optax.Schedule]:
    warmup, decay = _lengths(config, steps)
    last = config.final_fraction * peak
    if config.decay == "cosine":
        down = optax.cosine_decay_schedule(peak, decay, alpha=config.final_fraction)
    elif config.decay == "linear":
        down = optax.linear_schedule(peak, last, decay)
    else:

        def down(step):
            return peak - (peak - last) * jnp.sqrt(jnp.clip(step / decay, 0, 1))

    # Step 0 already moves: the ramp is (step + 1) / warmup.
    first = (last if again else 0.0) + (peak - last * again) / max(1, warmup)
    ramp = optax.linear_schedule(first, peak, max(1, warmup - 1))
    return [ramp, optax.constant_schedule(peak), down]


def make_optimizer(
    config: OptimizerConfig, steps: Cycles, axes: Mapping[str, Axes]
) -> optax.GradientTransformation:
    """Make the optimizer: gradient clipping, then AdamW or Muon.

    Args:
      steps: the end of the schedule, or the ends of its cycles.
      axes: logical axes of every parameter, by its name (`training.step.skeleton`).
    Raises:
      NotImplementedError: Muon, and a weight whose axes do not say which matrix it is.
    """
    adamw = optax.adamw(
        schedule(config, config.learning_rate, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: params | {name: decays(axes[name]) for name in _own(params)},
    )
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    if config.muon_learning_rate is None:
        return optax.chain(clip, adamw)

    for name, own in axes.items():
        _check_view(name, own)
    muon = optax.chain(
        optax.trace(decay=config.momentum, nesterov=True),
        optax.stateless(lambda updates, _: orthogonalize(updates, axes)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config, config.muon_learning_rate, steps)),
    )

    def labels(params: Params) -> dict[str, str]:
        return {name: "muon" if is_matrix(axes[name]) else "adamw" for name in params}

    return optax.chain(clip, optax.partition({"muon": muon, "adamw": adamw}, labels))


def _check_view(name: str, axes: Axes) -> None:
    if len(axes) > 1 and (None in axes or len(sides(axes)[1]) > 2):
        raise NotImplementedError(
            f"Muon cannot tell which matrix {name} is, with the axes {axes}: name every axis, and "
            "those that are one side together in jaxcp.training.optimizer.SIDES, or train with "
            "AdamW (muon_learning_rate=None)"
        )


def orthogonalize(updates: Params, axes: Mapping[str, Axes]) -> Params:
    """Bring the singular values of each matrix near 1, and multiply by sqrt(max(1, out / in)).

    Matrices of one shape go through Newton-Schulz in one batch, which is spread over all devices
    of the mesh in scope: parameters are replicated over `data` and `seq`, and without that every
    device would do all of this work. Source: Keller Jordan, github.com/KellerJordan/Muon.
    """
    mesh = jax.sharding.get_abstract_mesh()
    groups: dict[tuple[int, ...], list[tuple[str, jax.Array]]] = {}
    for name, x in _own(updates).items():
        whole = x if mesh.empty else jax.sharding.reshard(x, P())
        stack = _as_matrices(axes[name], whole)
        groups.setdefault(stack.shape[1:], []).append((name, stack))
    done = {}
    for members in groups.values():
        stacks = _newton_schulz_spread(jnp.concatenate([stack for _, stack in members]), mesh)
        start = 0
        for name, stack in members:
            end = start + stack.shape[0]
            done[name] = _from_matrices(axes[name], stacks[start:end], updates[name])
            start = end
    return {name: done.get(name, x) for name, x in updates.items()}


def _newton_schulz_spread(stack: jax.Array, mesh) -> jax.Array:
    if mesh.empty:
        return _newton_schulz(stack)
    short = -stack.shape[0] % mesh.size
    stack = jnp.pad(stack, ((0, short), (0, 0), (0, 0)))
    stack = jax.sharding.reshard(stack, P(mesh.axis_names))
    return jax.sharding.reshard(_newton_schulz(stack), P())


def _newton_schulz(x: jax.Array) -> jax.Array:
    """Run five steps of the quintic iteration on `[M, R, C]` with R <= C."""
    a, b, c = NEWTON_SCHULZ
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = jnp.einsum("mrc,msc->mrs", x, x)
        x = a * x + jnp.einsum(
            "mrs,msc->mrc", b * gram + c * jnp.einsum("mrs,mst->mrt", gram, gram), x
        )
    return x


def matrix_sizes(axes: Axes, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The number of matrices in a weight, their rows (summed over) and columns (written)."""
    numbered, (summed, _) = sides(axes)
    cut = numbered + summed
    return math.prod(shape[:numbered]), math.prod(shape[numbered:cut]), math.prod(shape[cut:])


def _as_matrices(axes: Axes, x: jax.Array) -> jax.Array:
    _, rows, columns = sizes = matrix_sizes(axes, x.shape)
    x = x.reshape(sizes)
    return x.swapaxes(1, 2) if rows > columns else x


def _from_matrices(axes: Axes, stack: jax.Array, like: jax.Array) -> jax.Array:
    _, rows, columns = matrix_sizes(axes, like.shape)
    stack = stack.swapaxes(1, 2) if rows > columns else stack
    x = (max(1.0, columns / rows) ** 0.5 * stack).reshape(like.shape).astype(like.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.sharding.reshard(x, jax.typeof(like).sharding.spec)


def _own(params: Params) -> Params:
    # `optax.partition` leaves a MaskedNode, which has no leaves, where a weight is not its own.
    return {name: x for name, x in params.items() if not isinstance(x, optax.MaskedNode)}
