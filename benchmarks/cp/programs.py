# SPDX-License-Identifier: Apache-2.0
"""The layer that is compiled: ours under a strategy, and tokamax's ring, forward and backward."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxcp
from benchmarks.deviceless.programs import Splash
from pallas_kernels.flash_attention import Mask, attention_backward, attention_forward

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama 3 8B, and a chip's share of larger models
TOKENS = 2048  # a device's, where programs are compiled

# Of those in deviceless/programs.py the best at head dim 128, on every chip.
SPLASH = {"forward": Splash(1024, 2048, 512, scheduler=True), "backward": Splash(1024, 1024, 512)}


def ours(strategy, mesh, tokens=TOKENS):
    """`(fn, args)`: the layer and the gradients of q, k and v, `tokens` a device."""

    def both(q, k, v, positions, dout):
        def layer(q, k, v):
            return jaxcp.context_parallel_attention(q, k, v, positions, strategy=strategy)

        out, pull = jax.vjp(layer, q, k, v)
        return out, pull(dout)

    def array(*shape, dtype=jnp.bfloat16):
        spec = NamedSharding(mesh, P(None, "seq"))
        return jax.ShapeDtypeStruct((1, tokens * mesh.size, *shape), dtype, sharding=spec)

    q, kv = array(HEADS, HEAD_DIM), array(KV_HEADS, HEAD_DIM)
    return both, (q, kv, kv, array(dtype=jnp.int32), q)


def kernels(tokens=TOKENS):
    """`(fn, args)`: a step of the forward pass, with a carry, and the backward pass; one device."""

    def both(q, k, v, positions, out, lse, dout, delta):
        ids = positions, positions, None, None
        options = dict(mask=Mask(), soft_cap=None, scale=HEAD_DIM**-0.5)
        options["implementation"] = "mosaic_tpu"
        forward = attention_forward(
            q, k, v, *ids, carry=(out, lse), out_dtype=jnp.float32, **options
        )
        return forward, attention_backward(q, k, v, *ids, lse, dout, delta, **options)

    group = HEADS // KV_HEADS
    q, kv = (jax.ShapeDtypeStruct((1, tokens, n, HEAD_DIM), jnp.bfloat16) for n in (group, 1))
    rows = jax.ShapeDtypeStruct((1, tokens, group), jnp.float32)
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    return both, (q, kv, kv, jax.ShapeDtypeStruct((1, tokens), jnp.int32), out, rows, q, rows)


def tokamax_ring(mesh, tokens=TOKENS):
    """`(fn, args)` of tokamax's ring, heads first. Its options are those of its own test."""
    from tokamax._src.ops.experimental.tpu.splash_attention import ring_attention_kernel as ring
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    forward, backward = SPLASH["forward"], SPLASH["backward"]
    config = splash.SplashConfig(
        block_q=forward.q,
        block_kv=forward.kv,
        block_kv_compute=forward.compute,
        block_q_dkv=backward.q,
        block_kv_dkv=backward.kv,
        block_kv_dkv_compute=backward.compute,
        use_experimental_scheduler=forward.scheduler,
        use_base2_exp=False,
        fuse_reciprocal=True,
    )
    length = tokens * mesh.size
    kernel = ring.make_ring_attention(
        masks.make_causal_mask((length, length)),
        is_mqa=False,
        ring_axis="seq",
        config=config,
        q_seq_shards=mesh.size,
        kv_seq_shards=mesh.size,
    )
    tokens_spec = P(None, "seq")
    layer = jax.shard_map(
        lambda kernel, q, k, v: kernel(q, k, v),
        in_specs=(kernel.manual_sharding_spec(), tokens_spec, tokens_spec, tokens_spec),
        out_specs=tokens_spec,
        check_vma=False,
    )

    def both(q, k, v, dout):
        out, pull = jax.vjp(lambda *qkv: layer(kernel, *qkv), q, k, v)
        return out, pull(dout)

    sharding = NamedSharding(mesh, tokens_spec)
    q, kv = (
        jax.ShapeDtypeStruct((heads, length, HEAD_DIM), jnp.bfloat16, sharding=sharding)
        for heads in (HEADS, KV_HEADS)
    )
    return both, (q, kv, kv, q)
