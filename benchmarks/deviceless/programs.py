# SPDX-License-Identifier: Apache-2.0
"""The programs that are compiled: ours on both kinds of chip, tokamax's on TPUs."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcp.tune import programs
from jaxcp.tune.programs import array
from pallas_kernels.gated_delta import gated_delta as delta_rule

TOKENS, HEADS, KV_HEADS = 4096, 2, 1
HEAD_DIMS = (64, 128, 256)
EXPERTS = dict(experts=192, embed=4096, width=1536)  # Hy3
TOKENS_PER_EXPERT = (8, 512)


def flash(what, head_dim, implementation):
    """`(fn, args)` of attention: causal, positions and segments on."""
    program = programs.flash_forward if what == "forward" else programs.flash_backward
    return program(implementation, tokens=TOKENS, heads=HEADS, kv_heads=KV_HEADS, head_dim=head_dim)


def decode(cache, implementation):
    """`(fn, args)` of one query a head against a long cache, 8 query heads a KV head."""
    return programs.decode(implementation, cache=jnp.dtype(cache), **programs.DECODE)


def matmul(tokens, implementation):
    """`(fn, args)` of one product at Hy3's shapes, `tokens` an expert."""
    return programs.matmul(implementation, **EXPERTS, tokens=tokens)


def gated_delta(by_channel, implementation):
    """`(fn, args)` of the rule and its gradient, at the heads of Qwen3-Next and Kimi Linear."""
    rows = 1, 1024, 2
    k, beta = array((*rows, 128), jnp.bfloat16), array(rows, jnp.float32)
    gate = array((*rows, 128), jnp.float32) if by_channel else beta

    def loss(*arrays):
        out, state = delta_rule(*arrays, implementation=implementation)
        return out.astype(jnp.float32).sum() + state.sum()

    return jax.grad(loss, (0, 1, 2, 3, 4)), (k, k, k, gate, beta)


def ragged_dot(tokens, chosen: list):
    """`(fn, args)` of tokamax's; the tile sizes that it chooses are put into `chosen`."""
    from tokamax._src.ops.gmm_v2 import gmm_v2 as kernel

    def tile_sizes(*args, **kwargs):
        chosen.append(kernel.calculate_tiling(*args, **kwargs))
        return chosen[-1]

    def run(lhs, rhs, sizes):
        return kernel.gmm_v2(lhs, rhs, sizes, tile_info=tile_sizes, zero_initialize=False)

    return run, matmul(tokens, "mosaic_tpu")[1]


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


def splash(what, head_dim, blocks: Splash):
    """`(fn, args)` of tokamax's splash attention, causal: the forward kernel, or its backward."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as kernel
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    layout, gradient = kernel.QKVLayout, what == "backward"
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
