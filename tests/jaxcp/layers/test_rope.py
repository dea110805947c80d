# SPDX-License-Identifier: Apache-2.0
"""Rotary positions, from the definition in complex float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcp.layers.rope import Llama3, Rope, YaRN, rotate


def yarn_by_channel(size, theta, factor, original, fast, slow, truncate):
    """Frequencies of arXiv 2309.00071, a channel at a time."""
    low, high = (
        size * np.log(original / (2 * np.pi * turns)) / (2 * np.log(theta))
        for turns in (fast, slow)
    )
    low, high = (np.floor(low), np.ceil(high)) if truncate else (low, high)
    low, high = max(low, 0), min(high, size - 1)
    out = []
    for j in range(size // 2):
        plain = theta ** (-2 * j / size)
        slowed = min(max((j - low) / (high - low), 0), 1)
        out.append(plain / factor * slowed + plain * (1 - slowed))
    return np.asarray(out)


def llama3_by_wavelength(size, theta, factor, original, low, high):
    """Frequencies of Llama 3.1, a channel at a time, by the number of tokens that a turn takes."""
    out = []
    for j in range(size // 2):
        plain = theta ** (-2 * j / size)
        wavelength = 2 * np.pi / plain
        if wavelength < original / high:
            out.append(plain)
        elif wavelength > original / low:
            out.append(plain / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append((1 - smooth) * plain / factor + smooth * plain)
    return np.asarray(out)


LLAMA = Llama3(factor=8.0, original_max_positions=8192)
GPT_OSS = YaRN(factor=32.0, original_max_positions=4096, truncate=False)


@pytest.mark.parametrize(
    "rope, expected, gain",
    [
        (Rope(theta=1e6), 1e6 ** (-np.arange(8) / 8), 1),
        (
            Rope(theta=150_000.0, yarn=GPT_OSS),
            yarn_by_channel(16, 150_000, 32, 4096, 32, 1, False),
            0.1 * np.log(32) + 1,
        ),
        (
            Rope(yarn=YaRN(factor=40.0, original_max_positions=64, attention_factor=1.0)),
            yarn_by_channel(16, 10_000, 40, 64, 32, 1, True),
            1,
        ),
        (
            Rope(theta=500_000.0, llama3=LLAMA),
            llama3_by_wavelength(16, 500_000, 8, 8192, 1, 4),
            1,
        ),
        (Rope(theta=1e4, linear=4.0), 1e4 ** (-np.arange(8) / 8) / 4, 1),
    ],
    ids=["default", "gpt-oss", "deepseek", "llama3", "linear"],
)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_pairs_turn_by_position_times_frequency(rope, expected, gain, interleaved, sign):
    rope = dataclasses.replace(rope, interleaved=interleaved)
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16))
    positions = np.asarray([[0, 1, 2, 100, 4000], [7, 3, 3, 9, 1000]], np.int32)
    turn = gain * np.exp(1j * sign * positions[..., None, None] * expected)
    found = np.asarray(rotate(jnp.asarray(x, jnp.float32), jnp.asarray(positions), rope, sign=sign))
    if interleaved:
        pairs, found = x[..., ::2] + 1j * x[..., 1::2], found[..., ::2] + 1j * found[..., 1::2]
    else:
        pairs, found = x[..., :8] + 1j * x[..., 8:], found[..., :8] + 1j * found[..., 8:]
    np.testing.assert_allclose(found, pairs * turn, atol=2e-3)  # float32 angles of 4,000 radians
    np.testing.assert_allclose(found[:, :3], (pairs * turn)[:, :3], atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_first_channels_alone_turn(interleaved):
    """Of 192 by 0.334, as in MiMo-V2-Flash, 64: slowed as a head of 64 is."""
    rope = Rope(theta=1e4, part=0.334, interleaved=interleaved, yarn=YaRN(
        factor=4.0, original_max_positions=64))  # fmt: skip
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 2, 192)), jnp.float32)
    positions = jnp.asarray([[0, 1, 2, 100, 70]], jnp.int32)
    found, whole = rotate(x, positions, rope), dataclasses.replace(rope, part=1.0)
    np.testing.assert_array_equal(found[..., :64], rotate(x[..., :64], positions, whole))
    np.testing.assert_array_equal(found[..., 64:], x[..., 64:])
    for part, size in ((0.334, 16), (0.1, 8)):
        with pytest.raises(ValueError, match=rf"even number of channels must turn.* of {size}"):
            Rope(part=part).turning(size)
    with pytest.raises(ValueError, match=r"part must be above 0, and 1 at most; got part=1\.5"):
        Rope(part=1.5)


def test_the_part_of_a_config():
    beside, within = {"partial_rotary_factor": 0.25}, {"rope_theta": 1e4}
    assert Rope.from_hf(beside, part=0.5).part == 0.25
    assert Rope.from_hf({"rope_parameters": within | beside}, part=0.5).part == 0.25
    assert Rope.from_hf({"rope_parameters": within}, part=0.5).part == 0.5
    with pytest.raises(ValueError, match=r"partial_rotary_factor must be one number; got 0\.25"):
        Rope.from_hf({"rope_parameters": beside, "partial_rotary_factor": 0.5}, part=0.5)
    with pytest.raises(ValueError, match="partial_rotary_factor must be a finite number"):
        Rope.from_hf({"partial_rotary_factor": "0.5"}, part=0.5)


@pytest.mark.parametrize(
    "fields, expected",
    [
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 8192},
            Rope(theta=5e5, llama3=LLAMA),
        ),
        ({"rope_type": "linear", "factor": 4}, Rope(theta=5e5, linear=4.0)),
        ({"type": "linear", "factor": 1.0}, Rope(theta=5e5)),
    ],
)  # fmt: skip
def test_slower_ropes_of_a_config(fields, expected):
    assert Rope.from_hf({"rope_theta": 500000, "rope_scaling": fields}) == expected
    assert Rope.from_hf({"rope_parameters": expected.to_hf()}) == expected


def test_llama3_leaves_blends_and_slows_channels_of_128():
    """Channels of Llama-3.1-8B: 29 stay, 6 are blended, 29 turn 8 times slower."""
    rope = Rope(theta=500_000.0, llama3=LLAMA)
    found, plain = rope.frequencies(128), Rope(theta=500_000.0).frequencies(128)
    np.testing.assert_allclose(found, llama3_by_wavelength(128, 5e5, 8, 8192, 1, 4), rtol=1e-12)
    ratio = plain / found
    assert [(ratio == 1).sum(), (ratio > 7.999).sum()] == [29, 29]
    with pytest.raises(ValueError, match="yarn, llama3 and linear: one at most"):
        Rope(yarn=GPT_OSS, llama3=LLAMA)


def test_rope_of_a_config():
    old = {"rope_theta": 150000, "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}}  # fmt: skip
    expected = Rope(theta=150_000.0, yarn=GPT_OSS)
    assert Rope.from_hf(old) == expected
    assert Rope.from_hf({"rope_parameters": expected.to_hf()}) == expected
    assert Rope.from_hf({"rope_theta": 1e6, "rope_scaling": None}) == Rope(theta=1e6)
    assert Rope.from_hf({}) == Rope()
    v3 = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
          "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    assert Rope.from_hf({"rope_parameters": v3}).yarn.gain == 1
    without = {k: v for k, v in v3.items() if not k.startswith("mscale")}
    assert Rope.from_hf({"rope_parameters": without}).yarn.gain == pytest.approx(1.36889, abs=1e-5)


LLAMA_4 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"type": "longrope", "short_factor": []}}, "rope_type='longrope'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "llama3 needs finite numbers.*'factor'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear needs finite numbers.*'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "linear must be positive.*linear=0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
            "linear: not known are beta_fast",
        ),
        (
            {"rope_scaling": LLAMA_4 | {"low_freq_factor": 4.0}},
            "low_freq_factor < high_freq_factor; got 4.0 and 4.0",
        ),
        ({"rope_scaling": LLAMA_4 | {"factor": "8"}}, "llama3 needs finite numbers.*'8'"),
        ({"rope_scaling": LLAMA_4 | {"attention_factor": 1.0}}, "not known are attention_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "not known are full_att"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn needs factor and original_max"),
    ],
)
def test_ropes_that_are_not_there(fields, message):
    with pytest.raises((NotImplementedError, ValueError), match=message):
        Rope.from_hf(fields)


YARN_4 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONGER = Rope(theta=1e6, yarn=YaRN(factor=4.0, original_max_positions=32768))


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN_4},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": YARN_4},
        {"rope_parameters": {"rope_theta": 1e6} | YARN_4, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {}, "rope_scaling": YARN_4, "rope_theta": 1e6},
        {"rope_parameters": YARN_4, "rope_scaling": YARN_4 | {"rope_theta": 1e6}},
        {"rope_parameters": {"type": "yarn"} | YARN_4 | {"rope_theta": 1e6}, "rope_theta": 1e6},
    ],
)
def test_rope_scaling_beside_rope_parameters(fields):
    """One set: YaRN that was added to a file is not dropped, and its theta stays."""
    assert Rope.from_hf(fields) == LONGER


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_parameters": {"factor": 2.0}, "rope_scaling": YARN_4}, "agree.*factor=2.0 and 4.0"),
        (
            {"rope_parameters": YARN_4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            "agree.*rope_type='yarn' and 'linear'",
        ),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "one number; got 1000000.0"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "type and rope_type are one"),
        ({"rope_scaling": {"factor": 4.0}}, "factor=4.0 does nothing with a rope_type of default"),
        ({"rope_scaling": "yarn"}, "needed an object or null"),
        ({"rope_theta": "1e6"}, "rope_theta must be a finite number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite number"),
        ({"rope_scaling": YARN_4 | {"factor": "4"}}, "yarn needs finite numbers; got .*factor"),
        ({"rope_scaling": YARN_4 | {"factor": -4}}, "yarn needs positive numbers"),
        ({"rope_scaling": YARN_4 | {"truncate": None}}, "truncate must be true or false"),
    ],
)
def test_ropes_that_contradict_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        Rope.from_hf(fields)
