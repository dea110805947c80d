# SPDX-License-Identifier: Apache-2.0
"""Policies of what the backward pass of a layer finds saved, and what it computes again.

The names are those of `jax.checkpoint_policies`, and one more.
"""

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.flash_attention import RESULT

Remat = bool | str
"""One of `POLICIES`; False saves all, True is "nothing_saveable"."""

POLICIES: dict[str, Callable[..., Any]] = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "attention_saveable": jax.checkpoint_policies.save_only_these_names(RESULT),
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
}
"""Policies by name. They save of a layer beside its input: nothing; the results of attention, whose
work grows with the square of the tokens; the results of products with weights, or of all products
(those inside Pallas kernels are none)."""

MOVES = ("broadcast_in_dim", "convert_element_type", "dynamic_slice", "gather", "name",
         "reshape", "reshard", "slice", "squeeze", "transpose")  # fmt: skip
"""Primitives whose results are not saved where weights are gathered: they cost little, and what
they make of a gathered weight is as large as it is."""


def check_remat(remat: Remat) -> None:
    """Raise ValueError for what is no policy."""
    if not isinstance(remat, bool) and remat not in POLICIES:
        names = ", ".join(POLICIES)
        raise ValueError(f"remat must be true, false or one of {names}; got remat={remat!r}")


def policy_of(remat: Remat, *, gathers: bool) -> Callable[..., Any] | None:
    """The policy for `jax.checkpoint`; None where it has nothing to do.

    Args:
      gathers: the layer gathers weights, which would else be saved whole, those of all layers.
    """
    if remat is False:
        return _all_but_moves if gathers else None
    return POLICIES["nothing_saveable" if remat is True else str(remat)]


def _all_but_moves(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in MOVES
