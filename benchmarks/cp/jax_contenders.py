# SPDX-License-Identifier: Apache-2.0
"""Every strategy of ours, and `ringattention`, on emulated CPU devices of one process.

python -m benchmarks.cp.jax_contenders ours|ringattention TOKENS     # then: commands on stdin
"""

import contextlib
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.cp import problem
from benchmarks.cp.problem import Contender


def with_gradients(layer):
    def both(q, k, v, dout):
        out, pull = jax.vjp(layer, q, k, v)
        return out, *pull(dout)

    return both


def contender(name, layer, mesh, order, arrays, alone=None, dtype=jnp.float32, note=""):
    """Make a contender of `layer(q, k, v)`, on tokens that lie over the mesh in `order`."""
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, P(None, "seq"))
        q, k, v, dout = (jax.device_put(x[:, order].astype(dtype), spec) for x in arrays.values())
        forward = jax.jit(layer).lower(q, k, v).compile()
        both = jax.jit(with_gradients(layer)).lower(q, k, v, dout).compile()

    def result():
        natural = np.argsort(order)
        results = (np.asarray(x)[:, natural] for x in both(q, k, v, dout))
        return dict(zip(problem.NAMES, results, strict=True))

    return Contender(
        name=name,
        forward=lambda: jax.block_until_ready(forward(q, k, v)),
        both=lambda: jax.block_until_ready(both(q, k, v, dout)),
        result=result,
        alone=alone,
        dtype=jnp.dtype(dtype).name,
        note=note,
    )


def strategies():
    """Label and value of what is compared: every strategy that takes a causal mask alone."""
    import jaxcp

    compared = [
        jaxcp.Ring(),
        jaxcp.Ring(bidirectional=True),
        jaxcp.AllGather(),
        jaxcp.AllGather(chunks=4),
        jaxcp.Ulysses(),
        jaxcp.USP(ulysses=2),
        jaxcp.RingPassQ(),
        jaxcp.FixedOrder(),
    ]
    return {label(value): value for value in compared}


def label(value) -> str:
    """A strategy as one writes it."""
    given = {
        name: getattr(value, name)
        for name, field in type(value).__dataclass_fields__.items()
        if name != "layout" and getattr(value, name) != field.default
    }
    return f"{type(value).__name__}({', '.join(f'{k}={v}' for k, v in given.items())})"


def ours(arrays, tokens):
    import jaxcp

    mesh = Mesh(jax.devices()[: problem.RANKS], ("seq",))
    for name, strategy in strategies().items():
        for dtype in (jnp.float32, jnp.bfloat16) if strategy == jaxcp.Ring() else (jnp.float32,):
            order = strategy.layout.order(tokens, problem.RANKS)
            suffix = ", bfloat16" if dtype == jnp.bfloat16 else ""
            yield contender(
                f"jaxcp {name}{suffix}",
                layer_of(strategy, order),
                mesh,
                order,
                arrays,
                functools.partial(on_one, strategy, arrays, dtype),
                dtype,
                "zigzag",
            )


def layer_of(strategy, order):
    import jaxcp

    positions = jnp.asarray(order, jnp.int32)[None]

    def layer(q, k, v):
        return jaxcp.context_parallel_attention(
            q, k, v, positions, strategy=strategy, implementation="xla"
        )

    return layer


def on_one(strategy, arrays, dtype):
    """The output on one device: plain attention, where the strategy promises no more."""
    order = np.arange(arrays["q"].shape[1])
    mesh = Mesh(jax.devices()[:1], ("seq",))
    with jax.set_mesh(mesh) if strategy.same_bits else contextlib.nullcontext():
        q, k, v = (jnp.asarray(arrays[x], dtype) for x in "qkv")
        return np.asarray(jax.jit(layer_of(strategy, order))(q, k, v))


def ringattention(arrays, tokens):
    from benchmarks.cpu_attention import import_ringattention
    from benchmarks.cpu_attention import ringattention as layer

    import_ringattention()
    mesh, one = (Mesh(jax.devices()[:n], ("seq",)) for n in (problem.RANKS, 1))
    order = np.arange(tokens)
    for chunk in (c for c in (64, 128, 256, 512) if c <= tokens // problem.RANKS):

        def alone(chunk=chunk):
            with jax.set_mesh(one):
                return np.asarray(jax.jit(layer(chunk))(*(jnp.asarray(arrays[x]) for x in "qkv")))

        name = f"ringattention, chunks of {chunk}"
        yield contender(name, layer(chunk), mesh, order, arrays, alone, note="contiguous")


GROUPS = {"ours": ours, "ringattention": ringattention}


def main(group: str, tokens: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", problem.RANKS)
    problem.serve(GROUPS[group](problem.inputs(tokens), tokens))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
