# SPDX-License-Identifier: Apache-2.0
"""Context-parallel attention on global arrays.

Needs no mesh and no specs: it reads the mesh in scope (`jax.set_mesh`) and how q is laid out.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from jaxcp.context_parallel.halo import Halo
from jaxcp.context_parallel.ring import Ring
from jaxcp.context_parallel.shards import on_shards
from jaxcp.context_parallel.strategy import Strategy, expanded
from jaxcp.sharding import ACTIVATIONS
from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import Mask, apply_sinks, check


def context_parallel_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"] | PyTree[Float[Array, "B T ..."]],
    v: Float[Array, "B T K V"] | None,
    positions: Int[Array, "B T"],
    *,
    strategy: Strategy | None = None,
    axis_name: str | tuple[str, ...] = "seq",
    segment_ids: Int[Array, "B T"] | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: Float[Array, "N"] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    consecutive: bool = False,
    implementation: str | None = None,
    expand: Callable[..., tuple[Array, Array]] | None = None,
    weights: tuple[Array, ...] = (),
) -> Float[Array, "B T N V"]:
    """Attention over a sequence that is sharded along `axis_name` of the mesh in scope.

    Arrays are global, in the strategy's layout (`strategy.layout.permute`), T a multiple of the
    number of shards. Positions are the only mask, so any layout gives the right result; the
    strategy's own balances the work. Without a mesh it is plain flash attention.

    Args:
      strategy: one of `jaxcp.context_parallel.STRATEGIES`; None takes `Ring()`.
      axis_name: the axis over which tokens lie, or two of them, the outer one first.
      positions: global position of every token; `PAD_POSITION` for pads. Values are not checked:
        where they start anew for each packed document, `segment_ids` must say so, or documents see
        each other, and the first ones what is later.
      consecutive: the caller's word that tokens lie in the strategy's layout and that those of a
        segment are consecutive. Layers with a window then exchange the window alone (`Halo`).
      expand, weights: see `latent_attention`; k is then the latent, and v None.
      Others as in `pallas_kernels.flash_attention`.
    Raises:
      ValueError: the mesh has no `axis_name`, or shapes that the mesh does not divide.
      NotImplementedError: the strategy cannot honour the mask.

    >>> with jax.set_mesh(jaxcp.make_mesh(seq=8)):
    ...     out = jax.jit(jaxcp.context_parallel_attention)(q, k, v, positions)
    """
    made_k, made_v = _made(k, v, expand, weights)
    check(q, made_k, made_v, positions, positions, segment_ids, segment_ids, sinks, soft_cap)
    options: dict[str, Any] = {
        "soft_cap": soft_cap,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "implementation": implementation,
    }
    if jax.sharding.get_abstract_mesh().empty:
        _check_mesh_needed(strategy)
        out, lse = flash_attention(
            q,
            *expanded(k, v, expand, weights),
            q_positions=positions,
            kv_positions=positions,
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids,
            causal=causal,
            window=window,
            **options,
        )
    else:
        strategy = _for_mask(strategy, window, consecutive)
        options |= {"axis_name": axis_name, "mask": Mask(causal=causal, window=window)}
        one_head = expand is not None and made_k.shape[2] == 1  # made on every device, as it is
        heads = qkv_spec(q, q if one_head else made_k, axis_name)
        arrays = q, k, v, weights, positions, segment_ids
        out, lse = _over_shards(strategy, heads, arrays, expand, options)
    return out if sinks is None else apply_sinks(out, lse, sinks)[0]


def latent_attention(
    q: Float[Array, "B T N H"],
    latent: PyTree[Float[Array, "B T ..."]],
    weights: tuple[Array, ...],
    positions: Int[Array, "B T"],
    *,
    expand: Callable[..., tuple[Array, Array]],
    **options: Any,
) -> Float[Array, "B T N V"]:
    """`context_parallel_attention` whose keys and values are made where they are used.

    `k, v = expand(latent, *weights)`, `[B, S, K, H]` and `[B, S, K, V]`. Only the latent travels:
    that of multi-head latent attention (arXiv 2405.04434), or one head that is key and value.

    Args:
      latent: an array, or a tree of them, replicated over heads.
      weights: arrays that `expand` takes. With an explicit mesh each keeps its sharding, so heads
        may be sharded over `model` as q's are; else they are replicated.
      expand: a function of local shards; the same function object for the same maths, or every
        call compiles anew.
      options: those of `context_parallel_attention`.
    Raises:
      NotImplementedError: the strategy sends heads (`Ulysses`, `USP`).
    """
    return context_parallel_attention(
        q, latent, None, positions, expand=expand, weights=weights, **options
    )


def _made(k, v, expand, weights):
    """k and v, or the shapes of what `expand` makes of them."""
    if expand is None:
        return k, v
    # shapes alone: what is sharded differently meets only inside shard_map
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (k, *weights))
    return jax.eval_shape(expand, *shapes)


def _for_mask(strategy, window, consecutive) -> Strategy:
    """The strategy to run: windows need no more than themselves, where the order is known."""
    strategy = Ring() if strategy is None else strategy
    if consecutive and window is not None and not strategy.same_bits:
        return Halo(layout=strategy.layout, checked=False)
    return strategy


def _check_mesh_needed(strategy):
    if strategy is not None and strategy.same_bits:
        raise ValueError(f"{strategy} needs a mesh: jaxcp.make_mesh(seq=1) will do")


def _copies(heads, weights, axis_name):
    """Axes beside `axis_name` on which the latent, and each weight, are the same everywhere.

    `heads` and `weights` are specs.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def missing(spec):
        used = {name for entry in (*spec, axis_name) for name in _names(entry)}
        return tuple(name for name in mesh.axis_names if name not in used and mesh.shape[name] > 1)

    return missing(heads[:2]), tuple(missing(spec) for spec in weights)


def weight_spec(x, heads) -> P:
    """The `PartitionSpec` of a weight: whole, or sharded as heads are.

    `expand` cannot know of anything else.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return P()
    spec = jax.typeof(x).sharding.spec
    used = {name for entry in spec for name in _names(entry)} - {None}
    if not used <= set(_names(heads[2])):
        raise ValueError(
            f"weights of latent_attention are whole or sharded as heads are ({heads[2]!r}); "
            f"got {x.shape} over {spec}: jax.sharding.reshard it"
        )
    return spec


def _over_shards(strategy, heads, arrays, expand, options):
    """`strategy.attend` on every device's shards; `(out, lse)`, global.

    `heads` is the spec of q; `arrays` are q, k, v, weights, positions and segment ids.
    """
    tokens, weights = P(*heads[:2]), tuple(weight_spec(x, heads) for x in arrays[3])
    keys = heads if expand is None else tokens
    if expand is not None:
        options = options | {"expand": expand}
        if strategy.same_bits:
            options |= {"copies": _copies(heads, weights, options["axis_name"])}

    def local(q, k, v, weights, positions, segment_ids):
        more = {"weights": weights} if weights else {}
        ids = positions, positions, segment_ids, segment_ids
        return strategy.attend(q, k, v, *ids, **options, **more)

    specs = heads, keys, keys, weights, tokens, tokens
    return on_shards(local, specs, (heads, P(*heads[:3])))(*arrays)


def ring_attention(q, k, v, positions, *, axis_name="seq", **options):
    """Attend by a ring: `context_parallel_attention` with `strategy=Ring()`.

    Takes `q [B, T, N, H]`, `k` and `v [B, T, K, H]` and `positions` int32 `[B, T]`, sharded over
    `axis_name` of the mesh in scope in any layout, and that function's other options; returns
    `[B, T, N, H]` in the same order, and raises what it raises. Source: arXiv 2310.01889.
    """
    return context_parallel_attention(
        q, k, v, positions, strategy=Ring(), axis_name=axis_name, **options
    )


def attention_fn(
    strategy: Strategy | None = None, *, axis_name: str = "seq", causal: bool = True, window=None
):
    """An `attention_fn` for stock `flax.nnx.MultiHeadAttention`: one changed line.

    Tokens must lie in the strategy's layout over `axis_name`, with no pads; positions follow from
    that. What it cannot honour (a mask array, a bias, dropout) raises NotImplementedError.
    """
    strategy = Ring() if strategy is None else strategy

    def attend(
        query,
        key,
        value,
        bias=None,
        mask=None,
        *,
        dropout_rate=0.0,
        deterministic=True,
        module=None,
        is_causal=False,
        **_,
    ):
        refused = {
            "mask": mask is not None,
            "bias": bias is not None,
            "sow_weights": module is not None,
            "dropout": dropout_rate > 0 and not deterministic,
        }
        if any(refused.values()):
            raise NotImplementedError(
                f"context-parallel attention cannot honour {[k for k, v in refused.items() if v]}: "
                "masks come from positions (attention_fn(causal=..., window=...)); "
                "call context_parallel_attention for packing"
            )
        if query.shape[1] != key.shape[1]:
            raise NotImplementedError(
                f"decoding with Flax's cache is not supported; got {query.shape}, {key.shape}"
            )
        mesh = jax.sharding.get_abstract_mesh()
        shards = math.prod(mesh.shape.get(name, 1) for name in _names(axis_name))
        order = strategy.layout.order(query.shape[1], shards)
        if order.size != query.shape[1]:
            raise ValueError(
                f"{query.shape[1]} tokens do not fill the layout ({order.size} places): "
                "use layout.permute"
            )
        positions = jnp.broadcast_to(jnp.asarray(order, jnp.int32), query.shape[:2])
        return context_parallel_attention(
            query,
            key,
            value,
            positions,
            strategy=strategy,
            axis_name=axis_name,
            causal=causal or is_causal,
            window=window,
            consecutive=True,
        )

    return attend


def qkv_spec(q, k, axis_name) -> P:
    """The `PartitionSpec` of `[B, T, N, H]` on the mesh in scope: batch, tokens, heads."""
    mesh = jax.sharding.get_abstract_mesh()
    for name in _names(axis_name):
        if name not in mesh.shape:
            raise ValueError(
                f"the mesh has no axis {name!r}; it has {mesh.axis_names}. "
                "Make it with jaxcp.make_mesh"
            )
        if dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[name] == AxisType.Manual:
            raise ValueError("already inside shard_map: call strategy.attend on local shards")
    batch, _, heads, _ = (*_spec_of(q), None, None, None, None)[:4]
    heads = _used(heads, axis_name)
    spec = P(_used(batch, axis_name), axis_name, heads, None)
    for dim, name in ((0, "batch"), (1, "tokens"), (2, "query heads")):
        _check_divides(q.shape[dim], spec[dim], mesh, name)
    _check_divides(k.shape[2], heads, mesh, "KV heads")
    return spec


def _spec_of(x):
    """The explicit sharding of `x`; where the mesh's axes are not explicit, our own names."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        return jax.typeof(x).sharding.spec
    batch, heads = (
        name if name in mesh.shape else None
        for name in (ACTIVATIONS["batch"], ACTIVATIONS["heads"])
    )
    return P(batch, None, heads, None)


def _names(entry) -> tuple:
    """The mesh axes of a spec entry."""
    return entry if isinstance(entry, tuple) else (entry,)


def _used(entry, axis_name):
    """A spec entry without `axis_name`, which belongs to the tokens."""
    names = tuple(n for n in _names(entry) if n not in (None, *_names(axis_name)))
    return None if not names else names if len(names) > 1 else names[0]


def _check_divides(size, entry, mesh, name):
    shards = 1
    for axis in _names(entry):
        shards *= 1 if axis is None else mesh.shape[axis]
    if size % shards:
        raise ValueError(
            f"{size} {name} do not divide over {shards} shards of mesh axis {entry!r}; "
            "pad or change the mesh"
        )
