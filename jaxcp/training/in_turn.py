# SPDX-License-Identifier: Apache-2.0
"""Run a function on pieces of a batch in turn, all but what looks across the pieces.

A compiler chooses how to compute by shapes, so that a product or a norm of two pieces at a time may
have other bits than one of sixteen. Here each device has one piece at a time, in a loop whose body
is the same on any number of devices; between the loops stand the calls that are given all pieces.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

ACROSS = core.Primitive("across_pieces")
"""Call of `whole` on all pieces: of one piece it has the shape of its first operand, with the last
dimension of its last."""


@ACROSS.def_abstract_eval
def _(*operands, whole):
    first, last = operands[0], operands[-1]
    return first.update(shape=(*first.shape[:-1], last.shape[-1]))


def across(whole: Callable, *operands: jax.Array) -> jax.Array:
    """Stand for `whole(*operands)` of all pieces, in a function that `in_turn` runs on one."""
    return ACROSS.bind(*operands, whole=whole)


def in_turn(one: Callable, *trees: Any) -> Any:
    """Compute `one(*trees)` of every piece, as `jax.vmap` would.

    Args:
      one: the function of a piece, which may call `across`.
      trees: arrays `[pieces, ...]`, the first axis over `seq`.
    Raises:
      NotImplementedError: `across` inside of what cannot be taken apart.
    """
    leaves, structure = jax.tree.flatten(trees)
    mesh = jax.sharding.get_abstract_mesh()
    rows = [
        jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=NamedSharding(mesh, _whole(x.ndim - 1)))
        for x in leaves
    ]
    closed, shape = jax.make_jaxpr(
        lambda *leaves: one(*jax.tree.unflatten(structure, leaves)), return_shape=True
    )(*rows)
    pieces = len(leaves[0])
    outs = _run(closed, [_Value(x, True) for x in leaves], pieces)
    return jax.tree.unflatten(jax.tree.structure(shape), [_spread(x, pieces) for x in outs])


class _Value(NamedTuple):
    array: jax.Array
    by_piece: bool
    """The first axis is that of pieces; else the array is the same for all."""


def _run(closed: Any, values: Sequence[_Value], pieces: int) -> list[_Value]:
    """Evaluate a jaxpr of one piece."""
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.invars, values, strict=True))
    env |= {var: _Value(x, False) for var, x in zip(jaxpr.constvars, closed.consts, strict=True)}

    def read(var: Any) -> _Value:
        return _Value(var.val, False) if isinstance(var, core.Literal) else env[var]

    parts = list(_parts(jaxpr.eqns))
    later = [_variables(jaxpr.outvars)]
    for eqns in reversed(parts[1:]):
        later.append(later[-1] | _variables(x for eqn in eqns for x in eqn.invars))
    for eqns, wanted in zip(parts, reversed(later), strict=True):
        if _is_across(eqns[0]):
            results = _taken_apart(eqns[0], [read(x) for x in eqns[0].invars], pieces)
            env |= zip(eqns[0].outvars, results, strict=True)
            continue
        made = [x for eqn in eqns for x in eqn.outvars]
        used = _variables(x for eqn in eqns for x in eqn.invars)
        ins, outs = [x for x in used if x not in made], [x for x in made if x in wanted]
        part = core.Jaxpr((), ins, outs, eqns, debug_info=jaxpr.debug_info.with_unknown_names())
        run = core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))
        results = _one_at_a_time(run, [env[x] for x in ins], pieces)
        env |= zip(outs, results, strict=True)
    return [read(x) for x in jaxpr.outvars]


def _parts(eqns: Sequence[Any]) -> Iterator[list[Any]]:
    """Cut into runs of equations of one piece, and single ones that look across."""
    for is_across, group in itertools.groupby(eqns, _is_across):
        if is_across:
            yield from ([eqn] for eqn in group)
        else:
            yield [*group]


def _is_across(eqn: Any) -> bool:
    inner = (x for x in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr) if _is_jaxpr(x))
    return eqn.primitive is ACROSS or any(
        _is_across(below) for x in inner for below in getattr(x, "jaxpr", x).eqns
    )


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def _variables(atoms: Iterable[Any]) -> dict[Any, None]:
    """The variables among the operands, each once, in order."""
    return dict.fromkeys(x for x in atoms if not isinstance(x, core.Literal))


def _taken_apart(eqn: Any, values: list[_Value], pieces: int) -> list[_Value]:
    """Evaluate an equation that looks across pieces, or has such a one inside."""
    params, name = eqn.params, eqn.primitive.name
    if eqn.primitive is ACROSS:
        return [_Value(params["whole"](*(_spread(x, pieces) for x in values)), True)]
    if name == "scan":
        return _scan(eqn, values, pieces)
    closed = params.get("jaxpr", params.get("call_jaxpr"))
    if name in ("jit", "pjit", "closed_call", "core_call"):
        return _run(closed, values, pieces)
    if name in ("checkpoint", "remat2", "remat"):
        closed = core.ClosedJaxpr(closed, ())

        def block(*arrays):
            inside = [_Value(x, own.by_piece) for x, own in zip(arrays, values, strict=True)]
            return [_spread(x, pieces) for x in _run(closed, inside, pieces)]

        again = jax.checkpoint(block, policy=params["policy"], prevent_cse=params["prevent_cse"])
        return [_Value(x, True) for x in again(*(x.array for x in values))]
    raise NotImplementedError(
        f"attention inside of {name} cannot be given all pieces at once: FixedOrder needs it in "
        "layers that are scanned, jitted or checkpointed"
    )


def _scan(eqn: Any, values: list[_Value], pieces: int) -> list[_Value]:
    """Scan over layers, all pieces in each."""
    params, body = eqn.params, eqn.params["jaxpr"].jaxpr
    scanned = _with_an_axis_more(eqn.invars, body.invars)
    carried = len(eqn.outvars) - _with_an_axis_more(eqn.outvars, body.outvars)
    consts = len(values) - scanned - carried
    fixed, first, rows = (
        values[:consts], values[consts : consts + carried], values[consts + carried :]
    )  # fmt: skip

    def turn(carry, row):
        inside = [_Value(x, True) for x in carry]
        own = [_Value(x, of.by_piece) for x, of in zip(row, rows, strict=True)]
        outs = [_spread(x, pieces) for x in _run(params["jaxpr"], [*fixed, *inside, *own], pieces)]
        return outs[:carried], outs[carried:]

    along = [jnp.moveaxis(x.array, 1, 0) if x.by_piece else x.array for x in rows]
    carry, outs = jax.lax.scan(
        turn, [_spread(x, pieces) for x in first], along,
        length=params["length"], reverse=params["reverse"],
    )  # fmt: skip
    return [_Value(x, True) for x in (*carry, *(jnp.moveaxis(x, 0, 1) for x in outs))]


def _with_an_axis_more(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Count the operands of a scan that its body is given a row of."""
    pairs = zip(outside, inside, strict=True)
    return sum(a.aval.ndim > b.aval.ndim for a, b in pairs)


def _one_at_a_time(run: Callable, values: list[_Value], pieces: int) -> list[_Value]:
    """Call `run` for each piece: devices beside each other, the pieces of a device in turn."""
    if not any(x.by_piece for x in values):
        return [_Value(x, False) for x in run(*(x.array for x in values))]
    devices = jax.sharding.get_abstract_mesh().shape["seq"]
    turns = [_turns(x.array, devices) for x in values if x.by_piece]
    axes = [0 if x.by_piece else None for x in values]

    def turn(_, own):
        # what slices the rows out, and what puts them in, may else become part of a computation
        own = iter(jax.lax.optimization_barrier(own))
        arrays = [next(own) if x.by_piece else x.array for x in values]
        outs = jax.vmap(run, in_axes=axes, axis_size=devices)(*arrays)
        return None, jax.lax.optimization_barrier(outs)

    _, outs = jax.lax.scan(turn, None, turns)
    return [_Value(_together(x), True) for x in outs]


def _turns(x: jax.Array, devices: int) -> jax.Array:
    """Reshape `[pieces, ...]` to `[pieces of a device, devices, ...]`."""
    shape = devices, len(x) // devices, *x.shape[1:]
    if devices == 1:  # jax 0.10 to 0.12: a scan inside of `vmap` loses an axis of one device
        return jax.sharding.reshard(x, _whole(x.ndim)).reshape(shape).swapaxes(0, 1)
    x = jax.lax.reshape(x, shape, out_sharding=P("seq", *[None] * x.ndim))
    return jnp.moveaxis(x, 0, 1)


def _together(x: jax.Array) -> jax.Array:
    """Reshape `[pieces of a device, devices, ...]` to `[pieces, ...]`."""
    x = jax.sharding.reshard(x, P(None, "seq"))
    shape = len(x) * x.shape[1], *x.shape[2:]
    return jax.lax.reshape(
        jnp.moveaxis(x, 1, 0), shape, out_sharding=P("seq", *[None] * (x.ndim - 2))
    )


def _whole(axes: int) -> P:
    return P(*[None] * axes)


def _spread(value: _Value, pieces: int) -> jax.Array:
    """The array with the axis of pieces."""
    x = value.array
    if value.by_piece:
        return x
    x = jnp.asarray(x)
    return jax.lax.broadcast(x, (pieces,), out_sharding=P("seq", *[None] * x.ndim))
