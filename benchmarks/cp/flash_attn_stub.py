# SPDX-License-Identifier: Apache-2.0
"""The two functions that `ring_flash_attn` takes of `flash_attn`, from PyTorch's own CPU kernel."""

import sys
import types

import torch

aten = torch.ops.aten


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1,
    softcap=0.0, alibi_slopes=None, return_softmax=False,
):  # fmt: skip
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *heads_first, dropout_p, causal, scale=softmax_scale
    )
    return out.transpose(1, 2), lse, None, None


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False,
    rng_state=None,
):  # fmt: skip
    heads_first = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads_first, softmax_lse, dropout_p, causal, scale=softmax_scale
    )
    for into, x in zip((dq, dk, dv), gradients, strict=True):
        into.copy_(x.transpose(1, 2))


def install() -> None:
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward = _flash_attn_forward
    interface._flash_attn_backward = _flash_attn_backward
    package = types.ModuleType("flash_attn")
    package.flash_attn_interface = interface
    sys.modules["flash_attn"], sys.modules["flash_attn.flash_attn_interface"] = package, interface
