# SPDX-License-Identifier: Apache-2.0
"""The attention programs that are compiled: ours on both kinds of chip, tokamax's on TPUs."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcp.tune import programs
from jaxcp.tune.parts import attention_flops
from pallas_kernels.flash_attention import tuning

TOKENS, HEADS, KV_HEADS = 4096, 2, 1
HEAD_DIMS = (64, 128, 256)


def ours(what, head_dim, implementation):
    """`(fn, args)`: causal, positions and segments on."""
    program = programs.flash_forward if what == "forward" else programs.flash_backward
    return program(implementation, tokens=TOKENS, heads=HEADS, kv_heads=KV_HEADS, head_dim=head_dim)


def flops(what, head_dim):
    """FLOPs of one query and key."""
    return attention_flops(f"mosaic_{what}", head_dim)


def tile(what, head_dim):
    """Queries and keys a block of our kernel on the mesh's chip."""
    sizes = tuning.blocks(f"mosaic_{what}", head_dim, jnp.bfloat16, interpret=False)
    return sizes.q, sizes.kv


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


# The best of 30 minutes' search on each chip that compile in seconds; the bar is the best of them.
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
