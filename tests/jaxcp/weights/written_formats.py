# SPDX-License-Identifier: Apache-2.0
"""Writes quantized tensors as people publish them, in numpy from the formats' definitions.

Each function takes a weight `[out, in]` and gives `(parts, exact)`: tensors by what follows the
weight's name without `weight`, and the float32 weight that they stand for.
"""

import ml_dtypes
import numpy as np
from test_mxfp4 import e2m1
from tiny_checkpoints import random_model, tensors, write

import jaxcp

BF16 = ml_dtypes.bfloat16
E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
E2M1 = np.array([e2m1(code) for code in range(16)], np.float32)


def fp8_tensor(w):
    """ModelOpt's FP8: one scale, and a static one for activations."""
    scale = np.float32(np.abs(w).max() / 448)
    values = (w / scale).astype(E4M3)
    parts = {"weight": values, "weight_scale": scale, "input_scale": np.float32(0.25)}
    return parts, values.astype(np.float32) * scale


def fp8_channel(w, dtype=ml_dtypes.bfloat16):
    """compressed-tensors' FP8: a scale an output, in the model's dtype."""
    scale = (np.abs(w).max(1, keepdims=True) / 448).astype(dtype)
    values = (w / scale.astype(np.float32)).clip(-448, 448).astype(E4M3)
    return {"weight": values, "weight_scale": scale}, values.astype(np.float32) * scale.astype(
        np.float32
    )


def fp8_block(w, name="weight_scale_inv"):
    """DeepSeek's: a scale for 128 x 128."""
    rows, columns = (-(-n // 128) for n in w.shape)
    scales = np.empty((rows, columns), np.float32)
    for i, j in np.ndindex(rows, columns):
        scales[i, j] = np.abs(w[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]).max() / 448
    spread = scales.repeat(128, 0).repeat(128, 1)[: w.shape[0], : w.shape[1]]
    values = (w / spread).astype(E4M3)
    return {"weight": values, name: scales}, values.astype(np.float32) * spread


def nearest_e2m1(x):
    return np.abs(x[..., None] - E2M1).argmin(-1).astype(np.uint8)


def two_a_byte(codes):
    return codes[:, ::2] | codes[:, 1::2] << 4


def nvfp4(w):
    """ModelOpt's NVFP4: e4m3 for 16, one factor for all, and a static scale for activations."""
    groups = w.reshape(len(w), -1, 16)
    whole = np.float32(np.abs(w).max() / (448 * 6))
    scales = (np.abs(groups).max(-1) / 6 / whole).astype(E4M3)
    unit = scales.astype(np.float32)[..., None]
    codes = nearest_e2m1(groups / np.maximum(unit * whole, 1e-30))
    exact = (E2M1[codes] * unit * whole).reshape(w.shape)
    parts = {
        "weight": two_a_byte(codes.reshape(w.shape)), "weight_scale": scales,
        "weight_scale_2": whole, "input_scale": np.float32(0.25),
    }  # fmt: skip
    return parts, exact


def nvfp4_packed(w):
    """compressed-tensors' NVFP4, whose factor for all divides."""
    made, _ = nvfp4(w)
    whole = np.float32(1) / made["weight_scale_2"]
    scales = (made["weight_scale"].astype(np.float32) / whole).repeat(16, 1)
    parts = {
        "weight_packed": made["weight"], "weight_scale": made["weight_scale"],
        "weight_global_scale": whole[None], "input_global_scale": np.float32([0.25]),
    }  # fmt: skip
    return parts, E2M1[apart(made["weight"])] * scales


def mxfp4_packed(w):
    """compressed-tensors' MXFP4: exponents in bytes."""
    groups = w.reshape(len(w), -1, 32)
    exponents = np.ceil(np.log2(np.abs(groups).max(-1) / 6))
    scales = np.exp2(exponents).astype(np.float32)[..., None]
    codes = nearest_e2m1(groups / scales)
    parts = {
        "weight_packed": two_a_byte(codes.reshape(w.shape)),
        "weight_scale": (exponents + 127).astype(np.uint8),
    }
    return parts, (E2M1[codes] * scales).reshape(w.shape)


def apart(values):
    return np.stack([values & 15, values >> 4], -1).reshape(len(values), -1)


def int4(w, group, *, symmetric=True, dtype=np.float32):
    """`(codes [out, in], zero points and scales [out, groups], exact)`, codes of 0 to 15."""
    groups = w.reshape(len(w), -1, group)
    low, high = groups.min(-1).clip(max=0), groups.max(-1).clip(min=0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    scales = ((high - low) / 15).astype(dtype).astype(np.float32)
    zeros = np.full(low.shape, 8) if symmetric else np.rint(-low / scales).clip(1, 15)
    codes = (np.rint(groups / scales[..., None]) + zeros[..., None]).clip(0, 15)
    exact = ((codes - zeros[..., None]) * scales[..., None]).astype(np.float32).reshape(w.shape)
    return codes.reshape(w.shape).astype(np.uint32), zeros.astype(np.uint32), scales, exact


def words(codes, bits=4, order=range(8)):
    """Int32 of codes along the last axis, the first in the lowest bits."""
    whole = codes.reshape(*codes.shape[:-1], -1, 32 // bits)
    shifted = [whole[..., code] << np.uint32(bits * i) for i, code in enumerate(order)]
    return np.bitwise_or.reduce(shifted).view(np.int32)


def pack_quantized(w, group=32, *, symmetric=True, order=None):
    """compressed-tensors' int4, as Kimi-K2.5 has it; `order`: of inputs, by which groups go."""
    turned = w if order is None else w[:, order]
    codes, zeros, scales, exact = int4(turned, group, symmetric=symmetric, dtype=BF16)
    parts = {"weight_scale": scales.astype(BF16), "weight_shape": np.array(w.shape)}
    if not symmetric:
        parts["weight_zero_point"] = words(zeros.T).T
    if order is not None:
        back = np.argsort(order)
        codes, exact = codes[:, back], exact[:, back]
        parts["weight_g_idx"] = (back // group).astype(np.int32)
    return parts | {"weight_packed": words(codes)}, exact


def gptq(w, group=32, *, symmetric=True, order=None, less=1):
    """`less`: what its first format takes from zero points."""
    turned = w if order is None else w[:, order]
    codes, zeros, scales, exact = int4(turned, group, symmetric=symmetric, dtype=np.float16)
    back = np.arange(w.shape[1]) if order is None else np.argsort(order)
    codes, exact = codes[:, back], exact[:, back]
    parts = {
        "qweight": words(codes).T, "scales": scales.T.astype(np.float16),
        "qzeros": words(zeros.T - np.uint32(less)), "g_idx": (back // group).astype(np.int32),
    }  # fmt: skip
    return parts, exact


def awq(w, group=32):
    codes, zeros, scales, exact = int4(w, group, symmetric=False, dtype=np.float16)
    order = 0, 2, 4, 6, 1, 3, 5, 7
    parts = {
        "qweight": words(codes.T, order=order), "qzeros": words(zeros.T, order=order),
        "scales": scales.T.astype(np.float16),
    }  # fmt: skip
    return parts, exact


def is_linear(name, w):
    kept = "norm", "embed", "gate.weight", "router", "conv1d", "shared_expert_gate"
    return name.endswith(".weight") and w.ndim == 2 and not any(x in name for x in kept)


def written(whole, pack):
    """All tensors, packed and exact; `pack(name)` gives the function for a linear weight."""
    parts, exact = {}, {}
    for name, w in whole.items():
        chosen = pack(name) if is_linear(name, w) else None
        if chosen is None:
            parts[name] = exact[name] = w
            continue
        made, exact[name] = chosen(w.astype(np.float32))
        stem = name.removesuffix("weight")
        parts |= {f"{stem}{part}": np.asarray(x) for part, x in made.items()}
    return parts, exact


def cache_scales(parts, names=("k_proj.k_scale", "v_proj.v_scale")):
    """A static scale a layer for the caches of keys and of values."""
    stems = {x.split("self_attn.")[0] for x in parts if "self_attn." in x}
    return {f"{stem}self_attn.{name}": np.float32(0.5) for stem in stems for name in names}


def checkpoints(folder, name, pack, quantization, *, rename=None, more=None, **fields):
    """Folders of a random checkpoint in the format that `pack` writes, and of what it stands for.

    `rename`: of every tensor's name. `more` gives tensors beside the packed ones. `fields` of
    config.json.
    """
    folder.mkdir(parents=True)
    fields = {"dtype": "float32"} | fields
    shaped = write(folder / "shaped", name, {}, **fields)
    whole = tensors(name)
    if len(fields) > 1:
        jaxcp.save(random_model(jaxcp.load_config(shaped)), folder / "random")
        whole = tensors(folder / "random")
    whole = {rename(k) if rename else k: v for k, v in whole.items()}
    parts, exact = written(whole, pack)
    parts |= {k: np.asarray(v) for k, v in more(parts).items()} if more else {}
    quantized = {"quantization_config": quantization} if quantization else {}
    return write(folder / "packed", name, parts, **fields, **quantized), write(
        folder / "exact", name, exact, **fields
    )
