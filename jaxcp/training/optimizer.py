# SPDX-License-Identifier: Apache-2.0
"""AdamW, or Muon for the matrices inside layers and AdamW for the rest.

Parameters are a flat dict from names (`layers.0.attention.q`) to arrays.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import optax

from jaxcp.training.config import OptimizerConfig
from jaxcp.training.muon import TABLES, Axes, Params, is_matrix, orthogonalize, sides

Cycles = int | tuple[int, ...]


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
        optax.stateless(lambda updates, _: updates | orthogonalize(_own(updates), axes)),
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
            "those that are one side together in jaxcp.training.muon.SIDES, or train with "
            "AdamW (muon_learning_rate=None)"
        )


def _own(params: Params) -> Params:
    # `optax.partition` leaves a MaskedNode, which has no leaves, where a weight is not its own.
    return {name: x for name, x in params.items() if not isinstance(x, optax.MaskedNode)}
