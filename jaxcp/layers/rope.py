# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: pairs of channels turn by position times frequency. Source: arXiv 2104.09864.

Half-split (NeoX, Llama, Hy3) pairs channel j with j + H/2, interleaved (DeepSeek) 2j with 2j + 1.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

HF_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}
YARN_KEYS = HF_KEYS | {
    "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor",
    "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip
LLAMA3_KEYS = HF_KEYS | {
    "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
}  # fmt: skip
KEYS = {"default": YARN_KEYS, "yarn": YARN_KEYS, "llama3": LLAMA3_KEYS, "linear": HF_KEYS}
"""Parameters that a rope_type may come with; those of yarn do nothing by default."""
LATER = {"later": True}
"""Metadata of a field of a model's configuration that runs from before it, which may go on, have
not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class YaRN:
    """Extends the context: slow channels turn `factor` times slower. Source: arXiv 2309.00071.

    A channel that turns more than `beta_fast` times over `original_max_positions` stays; one that
    turns less than `beta_slow` times is slowed; one between is blended. `truncate` rounds the
    borders to whole channels. cos and sin are multiplied by `attention_factor`; None is the
    paper's `0.1 ln(factor) + 1`.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self):
        gain = 1.0 if self.attention_factor is None else self.attention_factor
        turns = self.factor, self.original_max_positions, self.beta_fast, self.beta_slow, gain
        if not all(0 < x < math.inf for x in turns):
            raise ValueError(f"yarn needs positive numbers; got {self}")

    def slowed(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Slow `frequencies [H / 2]` of base `theta`, each as far as its channel is."""
        half = len(frequencies)

        def channel(turns):  # the one that turns so often
            length = self.original_max_positions / (2 * math.pi * turns)
            return half * math.log(length) / math.log(theta)

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp

    @property
    def gain(self) -> float:
        """The factor of cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Extends the context as Llama 3.1 does: slow channels turn `factor` times slower.

    A channel that turns more than `high_freq_factor` times over `original_max_positions` stays; one
    that turns less than `low_freq_factor` times is slowed; one between is blended by its turns.
    """

    factor: float
    original_max_positions: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        turns = self.low_freq_factor, self.high_freq_factor
        if not all(0 < x < math.inf for x in (self.factor, self.original_max_positions, *turns)):
            raise ValueError(f"llama3 needs positive numbers; got {self}")
        if turns[0] >= turns[1]:
            raise ValueError(
                f"llama3 needs low_freq_factor < high_freq_factor; got {turns[0]} and {turns[1]}"
            )

    def slowed(self, frequencies: np.ndarray) -> np.ndarray:
        """Slow `frequencies [H / 2]`, each as far as its channel is."""
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        stays = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        stays = np.clip(stays, 0, 1)
        return frequencies * stays + frequencies / self.factor * (1 - stays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Frequencies of base `theta`, as they are or slowed in one way: `yarn`, `llama3`, `linear`.

    `linear`: all channels turn so many times slower. Source: arXiv 2306.15595. `part`: the fraction
    of a head's channels that turn, the first ones.
    """

    theta: float = 10_000.0
    yarn: YaRN | None = None
    interleaved: bool = False
    llama3: Llama3 | None = None
    linear: float = dataclasses.field(default=1.0, metadata=LATER)
    part: float = dataclasses.field(default=1.0, metadata=LATER)

    def __post_init__(self):
        if not 0 < self.part <= 1:
            raise ValueError(f"part must be above 0, and 1 at most; got part={self.part}")
        if not 1 < self.theta < math.inf:
            raise ValueError(f"theta must be above 1, and finite; got theta={self.theta}")
        if not 0 < self.linear < math.inf:
            raise ValueError(f"linear must be positive, and finite; got linear={self.linear}")
        if (self.yarn is not None) + (self.llama3 is not None) + (self.linear != 1) > 1:
            raise ValueError(f"yarn, llama3 and linear: one at most; got {self}")

    def turning(self, size: int) -> int:
        """Count the channels of a head of `size` that turn.

        Raises:
          ValueError: they make no pairs.
        """
        count = int(size * self.part)
        if count < 2 or count % 2:
            raise ValueError(
                f"an even number of channels must turn, 2 or more; got {count} of {size}, "
                f"by part={self.part}"
            )
        return count

    def frequencies(self, size: int) -> np.ndarray:
        """The radians that each of the `size / 2` pairs turns in a position; float64."""
        frequencies = self.theta ** (-np.arange(0, size, 2) / size)
        if self.yarn is not None:
            return self.yarn.slowed(frequencies, self.theta)
        if self.llama3 is not None:
            return self.llama3.slowed(frequencies)
        return frequencies / self.linear

    @classmethod
    def from_hf(
        cls,
        fields: Mapping[str, Any],
        *,
        interleaved: bool = False,
        theta: float = 10_000.0,
        part: float | None = None,
        default: Mapping[str, Any] | None = None,
    ) -> "Rope":
        """Read a config.json: `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

        If both are there they are one set (`merged`). `theta`, `part` (`partial_rotary_factor`;
        None: all channels of the family turn) and `default`, a set of `rope_parameters`, are the
        family's values for fields that the file does not have.

        Raises:
          NotImplementedError: a `rope_type` other than those of `KEYS`, a partial rotation that the
            family does not have, or parameters that are not known here (such as one set a kind of
            layer).
          ValueError: a scaling without what it needs, such as `factor`; parameters that
            contradict each other, that are no numbers, or that do nothing.
        """
        rope = merged(fields)
        rope = dict(default or {}) if rope is None else rope
        kind = rope.get("rope_type", "default")
        if not isinstance(kind, str) or kind not in KEYS:
            raise NotImplementedError(
                f"rope_parameters: rope_type must be one of {', '.join(KEYS)}; "
                f"got rope_type={kind!r}"
            )
        if unknown := sorted(rope.keys() - KEYS[kind]):
            raise NotImplementedError(
                f"rope_parameters of rope_type {kind}: not known are {', '.join(unknown)}"
            )
        if kind == "default" and rope.get("factor") not in (None, 1):
            raise ValueError(
                f"factor={rope['factor']!r} does nothing with a rope_type of default; "
                "name the rope_type, or remove factor"
            )
        theta = _theta(rope, fields, theta)
        return cls(
            theta=theta,
            yarn=_yarn(rope, fields) if kind == "yarn" else None,
            llama3=_llama3(rope) if kind == "llama3" else None,
            linear=_numbers(rope, "linear", "factor")["factor"] if kind == "linear" else 1.0,
            interleaved=interleaved,
            part=_part(rope, fields, part),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` that `from_hf` reads."""
        part = {} if self.part == 1 else {"partial_rotary_factor": self.part}
        if self.linear != 1:
            return part | {"rope_type": "linear", "rope_theta": self.theta, "factor": self.linear}
        if self.llama3 is not None:
            return part | {
                "rope_type": "llama3",
                "rope_theta": self.theta,
                "factor": self.llama3.factor,
                "original_max_position_embeddings": self.llama3.original_max_positions,
                "low_freq_factor": self.llama3.low_freq_factor,
                "high_freq_factor": self.llama3.high_freq_factor,
            }
        if self.yarn is None:
            return part | {"rope_type": "default", "rope_theta": self.theta}
        y = self.yarn
        given = {} if y.attention_factor is None else {"attention_factor": y.attention_factor}
        return (
            part
            | given
            | {
                "rope_type": "yarn",
                "rope_theta": self.theta,
                "factor": y.factor,
                "original_max_position_embeddings": y.original_max_positions,
                "beta_fast": y.beta_fast,
                "beta_slow": y.beta_slow,
                "truncate": y.truncate,
            }
        )


def rotate(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], rope: Rope, *, sign: int = 1
) -> Float[Array, "B T N H"]:
    """Turn every pair of x's channels by its position; `sign=-1` turns back.

    Angles are float32, the rotation is in x's dtype. Channels after the first `rope.turning(H)`
    stay as they are.
    """
    turning = rope.turning(x.shape[-1])
    if turning < x.shape[-1]:
        whole = dataclasses.replace(rope, part=1.0)
        first = rotate(x[..., :turning], positions, whole, sign=sign)
        return jnp.concatenate([first, x[..., turning:]], axis=-1)
    frequencies = jnp.asarray(rope.frequencies(x.shape[-1]), jnp.float32)
    angle = positions[..., None, None].astype(jnp.float32) * frequencies
    gain = 1.0 if rope.yarn is None else rope.yarn.gain
    cos = (jnp.cos(angle) * gain).astype(x.dtype)
    sin = (jnp.sin(angle) * (gain * sign)).astype(x.dtype)
    if rope.interleaved:
        first, second = x[..., ::2], x[..., 1::2]
    else:
        first, second = jnp.split(x, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if rope.interleaved:
        return jnp.stack(turned, axis=-1).reshape(x.shape)
    return jnp.concatenate(turned, axis=-1)


def merged(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Merge `rope_parameters` and `rope_scaling` of a config.json into one set; None without both.

    A field may be in one alone: a `rope_scaling` that was added to a file with `rope_parameters`
    brings its type, and the theta stays. transformers 5 forgets that theta.

    Raises:
      ValueError: they contradict each other.
    """
    both = {key: fields.get(key) for key in ("rope_parameters", "rope_scaling")}
    if wrong := {k: v for k, v in both.items() if not isinstance(v, Mapping | None)}:
        raise ValueError(f"needed an object or null; got {wrong}")
    rope: dict[str, Any] = {}
    for part in both.values():
        for key, value in _one_type(part or {}).items():
            if rope.setdefault(key, value) != value:
                raise ValueError(
                    "rope_parameters and rope_scaling must agree where they say the same; "
                    f"got {key}={rope[key]!r} and {value!r}"
                )
    return rope if any(part is not None for part in both.values()) else None


def _one_type(part):
    """Rename `type`, the older name, to `rope_type`.

    Drops a type of default, which then contradicts no other type in the set beside it.
    """
    part = dict(part)
    kinds = [part.pop(key) for key in ("type", "rope_type") if key in part]
    if kinds and kinds[0] != kinds[-1]:
        raise ValueError(f"type and rope_type are one thing; got {kinds[0]!r} and {kinds[1]!r}")
    return part if not kinds or kinds[0] == "default" else part | {"rope_type": kinds[0]}


def _theta(rope, fields, theta):
    return float(_once("rope_theta", rope, fields, theta))


def _part(rope, fields, part):
    given = _once("partial_rotary_factor", rope, fields, 1.0 if part is None else part)
    if part is None and given != 1:
        raise NotImplementedError("partial_rotary_factor must be 1: all channels turn")
    return float(given)


def _once(key, rope, fields, default):
    """Read the number that is among the `rope_parameters`, or beside them."""
    given = [x for x in (rope.get(key), fields.get(key)) if x is not None]
    if wrong := [x for x in given if not _is_number(x)]:
        raise ValueError(f"{key} must be a finite number; got {key}={wrong[0]!r}")
    if len(set(given)) > 1:
        raise ValueError(
            f"{key} must be one number; got {given[0]} among the rope_parameters and "
            f"{given[1]} beside them"
        )
    return given[0] if given else default


def _yarn(rope, fields):
    original = rope.get("original_max_position_embeddings", fields.get("max_position_embeddings"))
    if rope.get("factor") is None or original is None:
        raise ValueError(
            f"yarn needs factor and original_max_position_embeddings; got {dict(rope)}"
        )
    # null in a config.json is as if it were not there
    numbers = {
        k: v for k, v in rope.items() if k not in ("rope_type", "truncate") and v is not None
    }
    if wrong := {k: v for k, v in numbers.items() if not _is_number(v)}:
        raise ValueError(f"yarn needs finite numbers; got {wrong}")
    if not isinstance(truncate := rope.get("truncate", True), bool):
        raise ValueError(f"truncate must be true or false; got truncate={truncate!r}")
    gain = numbers.get("attention_factor")
    if gain is None and numbers.get("mscale") and numbers.get("mscale_all_dim"):
        one, all_dim = (_mscale(rope["factor"], rope[k]) for k in ("mscale", "mscale_all_dim"))
        gain = one / all_dim
    return YaRN(
        factor=float(rope["factor"]),
        original_max_positions=original,
        beta_fast=float(numbers.get("beta_fast") or 32),
        beta_slow=float(numbers.get("beta_slow") or 1),
        truncate=truncate,
        attention_factor=gain,
    )


def _llama3(rope):
    names = "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"
    numbers = _numbers(rope, "llama3", *names)
    return Llama3(
        factor=numbers["factor"],
        original_max_positions=rope["original_max_position_embeddings"],
        low_freq_factor=numbers["low_freq_factor"],
        high_freq_factor=numbers["high_freq_factor"],
    )


def _numbers(rope, kind, *names):
    if wrong := {name: rope.get(name) for name in names if not _is_number(rope.get(name))}:
        raise ValueError(f"a rope_type of {kind} needs finite numbers; got {wrong}")
    return {name: float(rope[name]) for name in names}


def _is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool) and -1e38 < x < 1e38


def _mscale(factor, weight):
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
