# SPDX-License-Identifier: Apache-2.0
"""Ring attention against dense attention, forward and backward, and nothing of Flax.

python examples/ring_attention.py --smoke                          # 8 emulated CPU devices
python examples/ring_attention.py --tokens 16384 --dtype bfloat16  # GPUs, or one TPU host
python examples/ring_attention.py --hosts 4 --no-check             # on each host of a slice
python examples/ring_attention.py --compile-only v5p:4x4x4 --tokens 1048576
"""

import dataclasses
import functools
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental.multihost_utils import process_allgather

import jaxcp
from jaxcp.cli.several import Processes, one_of
from jaxcp.cli.terminal import one_line_errors
from jaxcp.compile import compile_for, parse_target

# Largest error by the largest value. GPUs and TPUs multiply float32 in fewer bits than it has.
TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2}
ROWS = jax.P("data", "seq")


@dataclasses.dataclass
class Args:
    tokens: int = 2048
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    hosts: int = 1  # processes that run this, one a host
    check: bool = True  # against dense attention, which holds tokens x tokens scores
    smoke: bool = False  # tiny, on 8 emulated CPU devices
    compile_only: str | None = None  # a target: v6e:2x4, tpu7x:2x2x1, rtx-pro-6000:8

    def shapes(self):
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        return [(name, (1, self.tokens, n, self.head_dim)) for name, n in heads.items()]


@functools.partial(jax.jit, static_argnames="implementation")
def both_passes(qkv, positions, implementation=None):
    def objective(qkv):
        out = jaxcp.ring_attention(**qkv, positions=positions, implementation=implementation)
        return jnp.sum(jnp.square(out.astype(jnp.float32))), out

    (_, out), grads = jax.value_and_grad(objective, has_aux=True)(qkv)
    return {"out": out} | {f"d{name}": grad for name, grad in grads.items()}


def run(args):
    shards, layout, rng = jax.device_count(), jaxcp.Zigzag(), np.random.default_rng(0)
    qkv = {name: rng.standard_normal(shape).astype(args.dtype) for name, shape in args.shapes()}
    positions = np.arange(args.tokens, dtype=np.int32)[None]
    with jax.set_mesh(jaxcp.make_mesh(seq=shards)):
        batch = jax.device_put(layout.permute(qkv | {"positions": positions}, shards), ROWS)
        places = batch.pop("positions")
        jax.block_until_ready(both_passes(batch, places))  # compiles
        start = time.perf_counter()
        found = jax.block_until_ready(both_passes(batch, places))
        seconds, kind = time.perf_counter() - start, jax.devices()[0].device_kind
    say = print if jax.process_index() == 0 else lambda *_: None
    say(f"{args.tokens:,} tokens over {shards} x {kind}: {seconds:.4f} s for both passes")
    if not args.check:
        return
    found = layout.inverse(process_allgather(found, tiled=True), shards, args.tokens)
    with jax.default_matmul_precision("highest"):  # and no mesh: all of it on one device
        qkv = {name: x.astype(np.float32) for name, x in qkv.items()}
        dense = jax.device_get(both_passes(qkv, positions, implementation="reference"))
    for name, x in dense.items():
        error = np.abs(found[name].astype(np.float32) - x).max() / np.abs(x).max()
        say(f"  {name:<4} differs from dense attention by {error:.1e} of its largest value")
        assert error < TOLERANCE[args.dtype], f"{name}: over {TOLERANCE[args.dtype]}"


def compile_only(args):
    target = parse_target(args.compile_only)
    mesh = target.mesh(seq=target.size)
    array = functools.partial(jax.ShapeDtypeStruct, sharding=jax.NamedSharding(mesh, ROWS))
    qkv = {name: array(shape, args.dtype) for name, shape in args.shapes()}
    print(compile_for(both_passes, (qkv, array((1, args.tokens), jnp.int32)), mesh))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    jax.config.update("jax_num_cpu_devices", 8)  # where there is no accelerator
    if args.smoke or args.compile_only:
        jaxcp.emulate_devices(8)  # even where there is one
    if args.smoke:
        args = dataclasses.replace(args, tokens=250, heads=4, head_dim=32)
    # JAXCP_DEBUG=1 shows where errors come from
    with one_line_errors(), one_of(Processes(distributed=args.hosts > 1)):
        compile_only(args) if args.compile_only else run(args)
