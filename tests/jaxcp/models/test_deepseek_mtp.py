# SPDX-License-Identifier: Apache-2.0
"""The layer that drafts, of DeepSeek-V3, V3.2 and V4: its tensors, and what it computes.

No other program's output of it is at hand. It is checked against float64 NumPy written from the
equations: all of V4's; of V3's and V3.2's what is before and behind the block, which is one of the
trunk's kind, checked against transformers in test_deepseek.py.
"""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from published import FLASH, PRO, R1, V32_EXP
from safetensors.numpy import load_file
from tiny_checkpoints import FIXTURES, assert_same, tensors, write

import jaxcp
from jaxcp import Zigzag, models, weights
from jaxcp.attention.over_cache import OverCache
from jaxcp.data.lookahead import following
from jaxcp.layers.stack import of_each_layer
from jaxcp.models.weight_table import sources

V3, V32, V4 = "deepseek-v3-tiny", "deepseek-v32-tiny", "deepseek-v4-tiny"


def near_one(rng, *shape):
    return (1 + rng.normal(scale=0.3, size=shape)).astype(np.float32)


def small(rng, *shape):
    return rng.normal(scale=shape[-1] ** -0.5, size=shape).astype(np.float32)


def v3_with_mtp(name):
    """The fixture, its last layer once more with other numbers, and what joins it to the trunk."""
    rng, before = np.random.default_rng(1), tensors(name)
    layer = {k: v for k, v in before.items() if ".layers.2." in k}
    extra = {k.replace("layers.2.", "layers.3."): v[::-1].copy() for k, v in layer.items()}
    after = "model.layers.3."
    extra |= {f"{after}{k}.weight": near_one(rng, 64) for k in ("enorm", "hnorm")}
    extra |= {f"{after}shared_head.norm.weight": near_one(rng, 64)}
    extra |= {f"{after}eh_proj.weight": small(rng, 64, 128)}
    extra |= {f"{after}embed_tokens.weight": before["model.embed_tokens.weight"]}
    extra |= {f"{after}shared_head.head.weight": before["lm_head.weight"]}
    return before | extra


def v4_with_mtp():
    """As `v3_with_mtp`; the block is made of parts of layers that have what it has."""
    rng = np.random.default_rng(1)
    before = load_file(FIXTURES / V4 / "model_official_names.safetensors")
    parts = {k: v for k, v in before.items() if "layers.3." in k and "compressor" not in k}
    extra = {k.replace("layers.3.", "mtp.0."): v[::-1].copy() for k, v in parts.items()}
    extra |= {f"mtp.0.{k}.weight": near_one(rng, 64) for k in ("enorm", "hnorm", "norm")}
    extra |= {f"mtp.0.{k}.weight": small(rng, 64, 64) for k in ("e_proj", "h_proj")}
    extra |= {"mtp.0.hc_head_fn": small(rng, 4, 256), "mtp.0.hc_head_base": small(rng, 4)}
    return before | extra | {"mtp.0.hc_head_scale": near_one(rng, 1)}


@functools.cache
def contents(name):
    return v4_with_mtp() if name == V4 else v3_with_mtp(name)


@pytest.fixture(params=[V3, V32, V4])
def name(request):
    return request.param


@pytest.fixture
def folder(name, tmp_path):
    return write(tmp_path / "in", name, contents(name), num_nextn_predict_layers=1)


def test_round_trip_is_exact(name, folder, tmp_path):
    model, _ = weights.load(folder)
    assert model.config.num_mtp_layers == 1
    weights.save(model, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == contents(name).keys()
    for k, v in contents(name).items():
        assert after[k].dtype == v.dtype and after[k].tobytes() == v.tobytes(), k
    again, _ = weights.load(tmp_path / "out")
    assert again.config == model.config
    assert_same(again, model)


def test_a_copy_that_is_none(tmp_path):
    other = "model.layers.3.shared_head.head.weight"
    changed = contents(V3) | {other: contents(V3)[other] + 1}
    with pytest.raises(ValueError, match=rf"ties it to:\n    {other} \(is not lm_head"):
        weights.load(write(tmp_path, V3, changed, num_nextn_predict_layers=1))
    without = {k: v for k, v in contents(V3).items() if k != other}
    model, _ = weights.load(write(tmp_path, V3, without, num_nextn_predict_layers=1))
    weights.save(model, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == without.keys()


def test_a_checkpoint_without_it(name):
    model, _ = jaxcp.load(FIXTURES / name)
    assert model.config.num_mtp_layers == 0
    with pytest.raises(ValueError, match="needs a model with an MTP layer"):
        model.draft(None, None, None, None)
    fields = json.loads((FIXTURES / name / "config.json").read_text())
    with pytest.raises(NotImplementedError, match="num_mtp_layers must be 0 or 1"):
        models.config_from_dict(fields | {"num_nextn_predict_layers": 2})


def rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def of_v3(w, embedded, hidden, positions, block):
    """The state of a draft: the embedding first, nothing of it at position 0."""
    after = "model.layers.3."
    embedded = np.where((positions == 0)[..., None], 0, embedded)
    parts = rms(embedded, w[f"{after}enorm.weight"]), rms(hidden, w[f"{after}hnorm.weight"])
    x = np.concatenate(parts, -1) @ w[f"{after}eh_proj.weight"].T
    x = rms(block(x), w[f"{after}shared_head.norm.weight"])
    return x, x


def of_v4(w, embedded, streams, positions, block):
    """Streams of a draft, and its state: streams summed by a head of its own, and normed."""
    e = rms(embedded, w["mtp.0.enorm.weight"]) @ w["mtp.0.e_proj.weight"].T
    h = rms(streams, w["mtp.0.hnorm.weight"]) @ w["mtp.0.h_proj.weight"].T
    x = block(e[:, :, None] + h)
    flat = rms(x.reshape(*x.shape[:2], -1), 1.0)
    gates = flat @ w["mtp.0.hc_head_fn"].T * w["mtp.0.hc_head_scale"] + w["mtp.0.hc_head_base"]
    summed = ((1 / (1 + np.exp(-gates)) + 1e-6)[..., None] * x).sum(2)
    return x, rms(summed, w["mtp.0.norm.weight"])


@jax.jit
def trunk(model, tokens, positions):
    return model.trunk(tokens, positions, model.attend_over(positions))[0]


@jax.jit
def one_block(model, x, positions):
    return model.mtp.block(x, positions, model.attend_over(positions))[0]


def expected(name, model, tokens, after, positions):
    """Logits of each draft."""
    w = {k: v.astype(np.float64) for k, v in contents(name).items()}
    table, head = ("embed", "head") if name == V4 else ("model.embed_tokens", "lm_head")
    x, found = np.asarray(trunk(model, tokens, positions), np.float64), []
    for depth in range(after.shape[-1]):
        ids = after[..., depth]

        def block(x):
            if name == V4:
                return v4_block(x, positions)
            return np.asarray(one_block(model, x.astype(np.float32), positions), np.float64)

        embedded = w[f"{table}.weight"][ids]
        x, state = (of_v4 if name == V4 else of_v3)(w, embedded, x, positions, block)
        found.append(state @ w[f"{head}.weight"].T)
    return found


def rope_last8(x, positions, sign=1):
    """Pairs (2i, 2i + 1) of the last 8 channels of `x [B, T, ..., H]`."""
    angle = sign * positions[..., None] * 10000.0 ** (-np.arange(4) / 4)
    turn = np.exp(1j * angle).reshape(*positions.shape, *[1] * (x.ndim - 3), 4)
    turned = (x[..., -8::2] + 1j * x[..., -7::2]) * turn
    both = np.stack([turned.real, turned.imag], -1).reshape(*x.shape[:-1], 8)
    return np.concatenate([x[..., :-8], both], -1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def v4_attention(w, x, positions):
    b, t, _ = x.shape
    q = rms(x @ w("wq_a.weight").T, w("q_norm.weight")) @ w("wq_b.weight").T
    q = rope_last8(rms(q.reshape(b, t, 4, 32), 1.0), positions)
    kv = rope_last8(rms(x @ w("wkv.weight").T, w("kv_norm.weight")), positions)
    scores = np.einsum("bthc,bsc->bhts", q, kv) / np.sqrt(32)
    far = positions[:, :, None] - positions[:, None]
    p = np.where(((far >= 0) & (far < 8))[:, None], np.exp(scores), 0.0)
    p = p / (p.sum(-1, keepdims=True) + np.exp(w("attn_sink"))[:, None, None])
    out = rope_last8(np.einsum("bhts,bsc->bthc", p, kv), positions, -1)
    out = out.reshape(b, t, 2, 64)  # two groups of two heads
    narrow = np.einsum("btgi,gri->btgr", out, w("wo_a.weight").reshape(2, 16, 64))
    return narrow.reshape(b, t, 32) @ w("wo_b.weight").T


def v4_experts(w, x):
    """Two of eight, and one that all go through; gates cut at 1."""

    def expert(name, x):
        g = np.minimum(x @ w(f"{name}.w1.weight").T, 1.0)
        u = np.clip(x @ w(f"{name}.w3.weight").T, -1.0, 1.0)
        return (g * sigmoid(g) * u) @ w(f"{name}.w2.weight").T

    scores = np.sqrt(np.log1p(np.exp(x @ w("gate.weight").T)))
    chosen = np.argsort(-(scores + w("gate.bias")), -1)[..., :2]
    weights = np.take_along_axis(scores, chosen, -1)
    weights = 1.5 * weights / weights.sum(-1, keepdims=True)
    y = expert("shared_experts", x)
    for e in range(8):
        y = y + ((chosen == e) * weights).sum(-1, keepdims=True) * expert(f"experts.{e}", x)
    return y


def v4_connected(w, site, x, layer):
    """Four streams `x [B, T, 4, D]` around a sub-layer."""
    u = rms(x.reshape(*x.shape[:2], -1), 1.0) @ w(f"hc_{site}_fn").T
    base, scale = w(f"hc_{site}_base"), w(f"hc_{site}_scale")
    pre = sigmoid(u[..., :4] * scale[0] + base[:4]) + 1e-6
    post = 2 * sigmoid(u[..., 4:8] * scale[1] + base[4:8])
    k = np.exp((u[..., 8:] * scale[2] + base[8:]).reshape(*u.shape[:2], 4, 4))
    k = k / k.sum(-1, keepdims=True) + 1e-6
    k = k / (k.sum(-2, keepdims=True) + 1e-6)
    for _ in range(19):
        k = k / (k.sum(-1, keepdims=True) + 1e-6)
        k = k / (k.sum(-2, keepdims=True) + 1e-6)
    y = layer(rms((pre[..., None] * x).sum(2), w(f"{site}_norm.weight")))
    return post[..., None] * y[:, :, None] + np.einsum("btjk,btjd->btkd", k, x)


def v4_block(x, positions):
    """The whole block of `mtp.0`, in float64 from the equations alone."""

    def of(part):
        return lambda name: contents(V4)[f"mtp.0.{part}{name}"].astype(np.float64)

    x = v4_connected(of(""), "attn", x, lambda y: v4_attention(of("attn."), y, positions))
    return v4_connected(of(""), "ffn", x, lambda y: v4_experts(of("ffn."), y))


def drafts(model, b):
    return model.mtp_logits(b["tokens"], b["after"], b["positions"])


@pytest.mark.slow
def test_drafts_are_those_of_the_equations(name, folder, mesh_of):
    """Of the token after next and the one after that, on one device and over a mesh."""
    model, _ = weights.load(folder)
    tokens = np.load(FIXTURES / name / "reference.npz")["input_ids"].astype(np.int32)[:, :12]
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    after = following(tokens, 2)
    wanted = expected(name, model, tokens, after, positions)
    batch = {"tokens": tokens, "positions": positions, "after": after}
    run = jax.jit(drafts)
    for one, other in zip(run(model, batch), wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4, rtol=0)
    mesh_of(seq=2)
    model, _ = weights.load(folder)
    batch = {k: jax.device_put(v, P("data", "seq")) for k, v in Zigzag().permute(batch, 2).items()}
    for one, other in zip(run(model, batch), wanted, strict=True):
        np.testing.assert_allclose(Zigzag().inverse(one, 2, 12), other, atol=2e-4, rtol=0)


@jax.jit
def drafted(model, cache, tokens, after, positions):
    """Trunk and draft of tokens that join the cache."""
    added = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    attend = OverCache(cache, positions, added, sharded=False)
    x = model.draft(model.trunk(tokens, positions, attend)[0], after, positions, attend)
    return model.logits(model.drafted(x)), attend.cache_after(cache.recent)


@pytest.mark.slow
def test_a_draft_over_the_cache_is_that_of_the_whole_sequence(name, folder):
    model, _ = weights.load(folder)
    tokens = np.load(FIXTURES / name / "reference.npz")["input_ids"].astype(np.int32)[:, :24]
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    after = following(tokens)
    batch = {"tokens": tokens, "positions": positions, "after": after}
    (wanted,) = jax.jit(drafts)(model, batch)
    cache = model.init_cache(batch_size=2, max_len=32)
    for part in (slice(0, 12), slice(12, 24)):
        arrays = (x[:, part] for x in (tokens, after[..., 0], positions))
        found, cache = drafted(model, cache, *arrays)
        np.testing.assert_allclose(found, wanted[:, part], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "published, names",
    [
        # 1,575 on the hub, of which 778 are scales: of 5 + 2 projections, and of 257 experts' three
        (FLASH, 1575 - (5 + 2 + 3 * 257)),
        pytest.param(PRO, None, marks=pytest.mark.slow),
        (R1, None),
        pytest.param(V32_EXP, None, marks=pytest.mark.slow),
    ],
    ids=["V4-Flash", "V4-Pro", "V3", "V3.2"],
)
def test_published_layers(published, names):
    """The layer counted from the widths in config.json."""
    with_it, without = (counted(published, layers) for layers in (1, 0))
    assert names is None or len(with_it[1] - without[1]) == names
    assert with_it[0] - without[0] == by_hand(published)
    assert with_it[1] > without[1]


def counted(published, layers):
    """Parameters of a model (selection biases too), and the names of its tensors."""
    config = models.config_from_dict(published)
    config = dataclasses.replace(config, num_mtp_layers=layers)
    leaves = of_each_layer(weights.abstract_model(config))
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    table = models.family_of(config).table(config)
    names = {x for source in sources(table, shapes).values() for x in source.names}
    tables = (math.prod(s) for k, s in shapes.items() if not k.endswith("experts_of_token"))
    return sum(tables), names


def by_hand(c):
    d, heads, experts = c["hidden_size"], c["num_attention_heads"], c["n_routed_experts"]
    wide = c["moe_intermediate_size"] * 3 * d * (experts + 1)
    ends = 2 * d * d + 3 * d  # what joins embedding and state, and their norms; the last norm
    common = wide + experts * (d + 1) + 2 * d + ends  # experts, router, the block's norms
    q = c["q_lora_rank"]
    if c["model_type"] == "deepseek_v4":
        h, groups, r = c["head_dim"], c["o_groups"], c["o_lora_rank"]
        attention = d * q + q + q * heads * h + d * h + h + heads + heads * h * r + groups * r * d
        streams = 2 * (24 * 4 * d + 24 + 3) + (4 * 4 * d + 4 + 1)
        return common + attention + streams
    kv, nope, rope, v = (
        c[k] for k in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    attention = d * q + q + q * heads * (nope + rope) + d * (kv + rope) + kv
    attention += kv * heads * (nope + v) + heads * v * d
    if c["model_type"] == "deepseek_v32":
        n, size = c["index_n_heads"], c["index_head_dim"]
        attention += q * n * size + d * size + 2 * size + d * n
    return common + attention
