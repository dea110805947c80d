# SPDX-License-Identifier: Apache-2.0
"""The attention programs that are compiled: ours on both kinds of chip, tokamax's on TPUs."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import Mask, attention_backward, tuning

TOKENS, HEADS, KV_HEADS = 4096, 2, 1
HEAD_DIMS = (64, 128, 256)
IDS = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, TOKENS, *shape), dtype)


def forward(head_dim, implementation):
    """`(fn, args)`: causal, positions and segments on."""

    def run(q, k, v, positions, segments):
        return flash_attention(
            q,
            k,
            v,
            q_positions=positions,
            kv_positions=positions,
            q_segment_ids=segments,
            kv_segment_ids=segments,
            implementation=implementation,
        )

    kv = array(KV_HEADS, head_dim)
    return run, (array(HEADS, head_dim), kv, kv, IDS, IDS)


def backward(head_dim, implementation):
    def run(q, k, v, positions, segments, lse, dout, delta):
        return attention_backward(
            q,
            k,
            v,
            positions,
            positions,
            segments,
            segments,
            lse,
            dout,
            delta,
            mask=Mask(),
            soft_cap=None,
            scale=head_dim**-0.5,
            implementation=implementation,
        )

    q, kv, row = array(HEADS, head_dim), array(KV_HEADS, head_dim), array(HEADS, dtype=jnp.float32)
    return run, (q, kv, kv, IDS, IDS, row, q, row)


def tile(kernel, head_dim):
    """Queries and keys a block of the kernel `flash_attention_...` on the mesh's chip."""
    op = f"mosaic_{kernel.removeprefix('flash_attention_')}"
    found = tuning.blocks(op, head_dim, jnp.bfloat16, interpret=False)
    return found.q, found.kv


@dataclasses.dataclass(frozen=True)
class Splash:
    """Block sizes of tokamax's kernel, and which operands lie with their tokens in lanes."""

    q: int
    kv: int
    compute: int
    seq_minor: str = ""  # letters of q, k, v
    scheduler: bool = False

    def __str__(self):
        text = f"{self.q}/{self.kv}/{self.compute}"
        text += f" {self.seq_minor} seq-minor" if self.seq_minor else ""
        return text + (" lp scheduler" if self.scheduler else "")


# The few that were best somewhere, of those that compile in seconds.
SPLASH = {
    "forward": (
        Splash(1024, 1024, 512, scheduler=True),
        Splash(1024, 2048, 512, scheduler=True),
    ),
    "backward": (Splash(1024, 1024, 512), Splash(1024, 1024, 256)),
}


def splash(head_dim, blocks: Splash, *, gradient):
    """`(fn, args)` of tokamax's splash attention, causal: the forward kernel, or its backward."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    layout = kernel.QKVLayout
    config = kernel.SplashConfig(
        block_q=blocks.q,
        block_kv=blocks.kv,
        block_kv_compute=blocks.compute,
        block_q_dkv=blocks.q if gradient else None,
        block_kv_dkv=blocks.kv if gradient else None,
        block_kv_dkv_compute=blocks.compute if gradient else None,
        use_experimental_scheduler=blocks.scheduler,
        **{
            f"{x}_layout": layout.SEQ_MINOR if x in blocks.seq_minor else layout.HEAD_DIM_MINOR
            for x in "qkv"
        },
    )
    mask = masks.CausalMask((TOKENS, TOKENS))
    attend = kernel.make_splash_mha_single_device(mask, config=config)

    def run(q, k, v):
        return attend(q, k, v)

    def both(q, k, v, dout):
        return jax.vjp(attend, q, k, v)[1](dout)

    q, kv = (jax.ShapeDtypeStruct((n, TOKENS, head_dim), jnp.bfloat16) for n in (HEADS, KV_HEADS))
    return (both, (q, kv, kv, q)) if gradient else (run, (q, kv, kv))
