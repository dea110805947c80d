# SPDX-License-Identifier: Apache-2.0
"""The context of a run, which may grow: longer rows from some steps on, and a new rotary base."""

import dataclasses
import math
import numbers
from collections.abc import Iterator
from typing import Any

from jaxcp.layers.rope import Rope

TRAINED = (("trained_positions",), ("attention", "max_positions"))
"""Fields of models' configs that say for which length a model was trained, and limit nothing."""

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextStage:
    """Rows of another length from a step on, with another base of rotary positions.

    Raises:
      ValueError: a step or a length that is no positive integer, or a base that is none.
    """

    step: int
    """Steps that are done when it begins."""
    seq_len: int
    rope_theta: float | None = None
    """The base of the rotary positions; None keeps the one before."""

    def __post_init__(self):
        sizes = self.step, self.seq_len
        if not all(isinstance(x, numbers.Integral) and x > 0 for x in sizes):
            raise ValueError(
                "a stage of the context needs a step and a seq_len, integers of at least 1; got "
                f"step={self.step!r}, seq_len={self.seq_len!r}"
            )
        if self.rope_theta is not None and not 1 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be above 1; got rope_theta={self.rope_theta!r}")


def check_order(seq_len: int, stages: tuple[ContextStage, ...], steps: int) -> None:
    """Check that stages ascend, within the steps of a run, and that each of them changes something.

    Args:
      seq_len: the length of rows before the first one.
    Raises:
      ValueError: they do not.
    """
    if wrong := [stage for stage in stages if not isinstance(stage, ContextStage)]:
        raise ValueError(f"context is made of ContextStage(step=, seq_len=); got {wrong[0]!r}")
    begins = [0, *(stage.step for stage in stages), steps]
    if begins != sorted(set(begins)):
        raise ValueError(
            f"stages of the context must ascend, and begin before steps={steps}; got steps "
            f"{begins[1:-1]}"
        )
    before = seq_len
    for stage in stages:
        if stage.seq_len < before or (stage.seq_len == before and stage.rope_theta is None):
            raise ValueError(
                f"a stage of the context has longer rows than the one before, {before} tokens, or "
                f"another rope_theta; got {stage}"
            )
        before = stage.seq_len


def runs_of(config: Any) -> dict[int, Any]:
    """The run as it is in each stage of its context, by the steps that are done when that begins.

    Raises:
      ValueError: the model has too few positions, or has not one rotary base, which is to change.
    """
    run = dataclasses.replace(config, context=())
    runs = {0: run}
    for stage in config.context:
        model = _for_length(run.model, stage.seq_len)
        if stage.rope_theta is not None:
            model = _with_base(model, stage.rope_theta)
        run = dataclasses.replace(run, seq_len=stage.seq_len, model=model)
        runs[stage.step] = run
    return runs


def base_of(model_config: Any) -> float | None:
    """The base of a model's rotary positions; None where it has none, or several."""
    bases = [getattr(rope, "theta", None) for _, rope in _ropes(model_config)]
    return bases[0] if len(bases) == 1 else None


def _with_base(model_config: Any, theta: float) -> Any:
    found = list(_ropes(model_config))
    if len(found) != 1:
        names = ", ".join(".".join(path) for path, _ in found) or "none"
        raise ValueError(
            "rope_theta of a stage needs a model with one set of rotary positions; "
            f"{type(model_config).__name__} has {names}. Leave rope_theta out"
        )
    path, rope = found[0]
    return _replaced(model_config, path, dataclasses.replace(rope, theta=float(theta)))


def _for_length(model_config: Any, seq_len: int) -> Any:
    """The model's config, which says that it was trained for rows of this length."""
    for path in TRAINED:
        value = model_config
        for name in path:
            value = getattr(value, name, None)
        if value is not None and value < seq_len:
            model_config = _replaced(model_config, path, seq_len)
    return model_config


def _ropes(config: Any, path: Path = ()) -> Iterator[tuple[Path, Rope]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Rope):
            yield (*path, field.name), value
        elif dataclasses.is_dataclass(value):
            yield from _ropes(value, (*path, field.name))


def _replaced(config: Any, path: Path, value: Any) -> Any:
    name, *rest = path
    inner = _replaced(getattr(config, name), tuple(rest), value) if rest else value
    return dataclasses.replace(config, **{name: inner})
