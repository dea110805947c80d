# SPDX-License-Identifier: Apache-2.0
"""Maps the logical axes of parameters, and of activations, to mesh axes."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

ACTIVATIONS = {"batch": "data", "tokens": "seq", "heads": "model"}
"""The mesh axes of activations; the widths of the residual stream are whole on every device. No
choice: the models' own shardings say so too."""

REPLICAS = ("data", "seq")
"""The mesh axes whose devices hold different tokens, and by most `Rules` the same parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The mesh axis of each logical axis of a parameter; None is whole on every device.

    They say nothing of activations (`ACTIVATIONS`), so a parameter may lie over "data" as well.
    Layers do not gather what they sum over: such an axis can be placed, and not yet be used.

    Raises:
      ValueError: experts over another axis than expert, seq or data.

    >>> model, tokenizer = jaxcp.load(path, rules=jaxcp.Rules(experts="seq"))
    """

    heads: str | None = "model"  # independent until the output projection sums them
    kv_heads: str | None = "model"
    mlp: str | None = "model"  # widths, of each expert too: summed by the down projection
    embed: str | None = None  # the residual stream is whole, so norms need no communication
    head_dim: str | None = None
    latent: str | None = None  # narrow, and all heads read it
    head_groups: str | None = "model"  # of an output through narrow middles: heads lie with theirs
    group_heads: str | None = None  # within such a group
    index_heads: str | None = None  # of an indexer: small, every device scores for all its queries
    vocab: str | None = None
    """The head and the table of embeddings. Where tokens do not lie over that axis (a step
    of decoding), each device computes its part of the logits; else the head is gathered."""
    experts: str | None = "expert"
    """Experts over "seq" or "data" lie on the devices that hold tokens, which then travel to them;
    over "expert" every device sees the same tokens."""
    choices: str | None = None  # a router's columns: every device chooses among all experts
    positions: str | None = None
    window: str | None = None  # of an n-gram embedding: small
    ngram: str | None = None
    parts: str | None = None  # what an MTP layer joins: embedding and state
    places: str | None = None  # of a token within its block
    layers: str | None = None  # every device runs all layers (`layers.stack`)
    mixes: str | None = None  # coefficients of hyper-connections

    def __post_init__(self):
        if self.experts not in ("expert", "seq", "data"):
            raise ValueError(f"experts lie over expert, seq or data; got experts={self.experts!r}")

    def spec(self, axes: Sequence[str | None]) -> P:
        """The `PartitionSpec` of a parameter of these logical axes.

        Raises:
          ValueError: two of them over one mesh axis.
        """
        lies = {axis: getattr(self, axis) for axis in axes if axis is not None}
        for one, other in itertools.combinations(lies, 2):
            if lies[one] is not None and lies[one] == lies[other]:
                raise ValueError(
                    f"the axes of a parameter need mesh axes of their own; got {one} and {other} "
                    f"of {tuple(axes)} both over {lies[one]!r}: choose others in jaxcp.Rules"
                )
        return P(*(None if axis is None else lies[axis] for axis in axes))


DEFAULT = Rules()


def sharding_of(variable: Any, rules: Rules = DEFAULT) -> P:
    """The `PartitionSpec` of an `nnx.Variable`; replicated where it names no axes."""
    return rules.spec(variable.get_metadata().get("axes") or ())


def over_replicas(
    spec: P, shape: Sequence[int], mesh: Mapping[str, int], *, stacked: bool = False
) -> P:
    """Cut into parts over `REPLICAS` an array that `spec` leaves whole there.

    They all cut one dimension, the largest that they divide; where there is none, each of them
    cuts the largest that it divides. An axis that divides none leaves the array whole. Source:
    ZeRO (arXiv 1910.02054).

    Args:
      mesh: sizes of the axes.
      stacked: the first dimension numbers layers, which are taken one at a time: it stays whole.
    """
    axes_of = [names_of(entry) for entry in (*spec, *[None] * (len(shape) - len(spec)))]
    used = {axis for axes in axes_of for axis in axes}
    free = tuple(axis for axis in REPLICAS if mesh[axis] > 1 and axis not in used)

    def size_here(dim: int) -> int:
        return shape[dim] // math.prod(mesh[axis] for axis in axes_of[dim])

    for axes in (free, *((axis,) for axis in free)):
        parts = math.prod(mesh[axis] for axis in axes)
        dims = [dim for dim in range(stacked, len(shape)) if size_here(dim) % parts == 0]
        if dims and not used & {*axes}:
            dim = max(dims, key=size_here)
            axes_of[dim] += axes
            used |= {*axes}
    return P(*(axes[0] if len(axes) == 1 else axes or None for axes in axes_of))


def names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of an entry of a `PartitionSpec`."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def gathered_beside(x: jax.Array, spec: P | None) -> jax.Array:
    """`x`, whole over the mesh axes in `spec`; as it is without a mesh."""
    if spec is None or jax.sharding.get_abstract_mesh().empty:
        return x
    taken = {axis for entry in spec for axis in names_of(entry)}
    left = [{*names_of(entry)} - taken for entry in jax.typeof(x).sharding.spec]
    return jax.sharding.reshard(x, P(*(tuple(sorted(axes)) or None for axes in left)))


def tokens_spec(x) -> P | None:
    """The `PartitionSpec` of the leading `[B, T]` of an explicit array; None without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    spec = jax.typeof(x).sharding.spec
    return P(*(*spec, None, None)[:2])
