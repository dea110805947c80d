# SPDX-License-Identifier: Apache-2.0
"""Traces some steps of a run with JAX's profiler; `xprof DIR` or ui.perfetto.dev shows them."""

import dataclasses
import pathlib

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """The steps that are traced: `count` of them from `step` on.

    Raises:
      ValueError: a number below 1.
    """

    step: int
    count: int = 1

    def __post_init__(self):
        if self.step < 1 or self.count < 1:
            raise ValueError(f"a profile needs a step and a count of 1 or more; got {self}")

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """Read STEP:COUNT, or STEP.

        Raises:
          ValueError: it is not that.
        """
        step, _, count = text.partition(":")
        if not step.isdigit() or not (count or "1").isdigit():
            raise ValueError(f"--profile takes STEP:COUNT, as 100:5; got {text!r}")
        return cls(step=int(step), count=int(count or 1))

    def check(self, steps: int) -> None:
        """Check that a run of so many steps has them all.

        Raises:
          ValueError: it has not.
        """
        last = self.step + self.count - 1
        if last > steps:
            raise ValueError(
                f"the profile is of steps {self.step} to {last}; the run has {steps}: choose "
                "steps of its own"
            )

    def before(self, step: int, folder: pathlib.Path) -> None:
        """Begin to trace where `step` is the first."""
        if step == self.step:
            jax.profiler.start_trace(folder, create_perfetto_trace=True)

    def after(self, step: int, out: object) -> None:
        """End where `step` was the last, when the device has done it."""
        if step == self.step + self.count - 1:
            jax.block_until_ready(out)
            jax.profiler.stop_trace()
