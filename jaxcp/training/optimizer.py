# SPDX-License-Identifier: Apache-2.0
"""AdamW, or Muon for the matrices inside layers and AdamW for the rest.

Parameters are a flat dict from names (`layers.0.attention.q`) to arrays; the name says what a
weight is, because the shape does not (`q` and an expert's `gate` both have three axes).
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxcp.training.config import OptimizerConfig

Params = dict[str, jax.Array]

MATRICES = {
    "q": (1, 2),  # [D, N, H] is the matrix [D, N*H]
    "k": (1, 2),
    "v": (1, 2),
    "o": (2, 1),  # [N, H, D] is the matrix [N*H, D]
    "gate": (1, 1),  # [D, F], or one matrix an expert of [E, D, F]
    "up": (1, 1),
    "down": (1, 1),
    "router": (1, 1),
    "proj": (2, 1),  # [W, C, D] of an n-gram embedding is the matrix [W*C, D]
}
"""Weights that Muon takes, by the last part of their name: how many of the last axes
are summed over, how many of those are written. AdamW takes a weight that is not here."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def is_matrix(name: str) -> bool:
    """Whether Muon takes the weight of this name."""
    return name.startswith(("layers.", "ngram.")) and name.rpartition(".")[2] in MATRICES


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases (`q_bias` is `[N, H]`)."""
    return ndim > 1 and not name.endswith(("bias", "scale"))


def schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, level, then down to `final_fraction * peak` after `steps`."""
    warmup = min(config.warmup_steps, steps)
    decay = min(max(1, round(config.decay_fraction * steps)), max(1, steps - warmup))
    if config.decay == "cosine":
        down = optax.cosine_decay_schedule(peak, decay, alpha=config.final_fraction)
    else:
        down = optax.linear_schedule(peak, config.final_fraction * peak, decay)
    # Step 0 already moves: the ramp is (step + 1) / warmup.
    ramp = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    level = optax.constant_schedule(peak)
    return optax.join_schedules([ramp, level, down], [warmup, steps - decay])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Gradient clipping, then AdamW or Muon; `steps` is the length of the schedule."""
    adamw = optax.adamw(
        schedule(config, config.learning_rate, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decay_mask,
    )
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    if config.muon_learning_rate is None:
        return optax.chain(clip, adamw)

    muon = optax.chain(
        optax.trace(decay=config.momentum, nesterov=True),
        optax.stateless(lambda updates, _: orthogonalize(updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule(config, config.muon_learning_rate, steps)),
    )

    def labels(params: Params) -> dict[str, str]:
        return {name: "muon" if is_matrix(name) else "adamw" for name in params}

    return optax.chain(clip, optax.partition({"muon": muon, "adamw": adamw}, labels))


def orthogonalize(updates: Params) -> Params:
    """Each matrix with its singular values near 1, times sqrt(max(1, out / in)).

    Matrices of one shape go through Newton-Schulz in one batch, which is spread over all devices
    of the mesh in scope: parameters are replicated over `data` and `seq`, and without that every
    device would do all of this work. Source: Keller Jordan, github.com/KellerJordan/Muon.
    """
    mesh = jax.sharding.get_abstract_mesh()
    groups: dict[tuple[int, ...], list[tuple[str, jax.Array]]] = {}
    for name, x in _own(updates).items():
        stack = _as_matrices(name, x if mesh.empty else jax.sharding.reshard(x, P()))
        groups.setdefault(stack.shape[1:], []).append((name, stack))
    done = {}
    for members in groups.values():
        stacks = _newton_schulz_spread(jnp.concatenate([stack for _, stack in members]), mesh)
        start = 0
        for name, stack in members:
            done[name] = _from_matrices(name, stacks[start : start + stack.shape[0]], updates[name])
            start += stack.shape[0]
    return {name: done.get(name, x) for name, x in updates.items()}


def _newton_schulz_spread(stack: jax.Array, mesh) -> jax.Array:
    if mesh.empty:
        return _newton_schulz(stack)
    short = -stack.shape[0] % mesh.size
    stack = jnp.pad(stack, ((0, short), (0, 0), (0, 0)))
    stack = jax.sharding.reshard(stack, P(mesh.axis_names))
    return jax.sharding.reshard(_newton_schulz(stack), P())


def _newton_schulz(x: jax.Array) -> jax.Array:
    """Five steps of the quintic iteration on `[M, R, C]` with R <= C."""
    a, b, c = NEWTON_SCHULZ
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = jnp.einsum("mrc,msc->mrs", x, x)
        x = a * x + jnp.einsum(
            "mrs,msc->mrc", b * gram + c * jnp.einsum("mrs,mst->mrt", gram, gram), x
        )
    return x


def _sizes(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(how many matrices, rows, columns)."""
    summed, written = MATRICES[name.rpartition(".")[2]]
    cut = len(shape) - summed - written
    return (
        math.prod(shape[:cut]),
        math.prod(shape[cut : cut + summed]),
        math.prod(shape[cut + summed :]),
    )


def _as_matrices(name: str, x: jax.Array) -> jax.Array:
    _, rows, columns = sizes = _sizes(name, x.shape)
    x = x.reshape(sizes)
    return x.swapaxes(1, 2) if rows > columns else x


def _from_matrices(name: str, stack: jax.Array, like: jax.Array) -> jax.Array:
    _, rows, columns = _sizes(name, like.shape)
    stack = stack.swapaxes(1, 2) if rows > columns else stack
    x = (max(1.0, columns / rows) ** 0.5 * stack).reshape(like.shape).astype(like.dtype)
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.sharding.reshard(x, jax.typeof(like).sharding.spec)


def _decay_mask(params: Params) -> dict:
    return params | {name: decays(name, x.ndim) for name, x in _own(params).items()}


def _own(params: Params) -> Params:
    # `optax.partition` leaves a MaskedNode, which has no leaves, where a weight is not its own.
    return {name: x for name, x in params.items() if not isinstance(x, optax.MaskedNode)}
