# SPDX-License-Identifier: Apache-2.0
"""Sizes of the pool: by tokens, by bytes, by a fraction of what is free."""

import itertools
import logging

import jax
import pytest
from slow import slow_but
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp.inference.geometry import geometry_of


class Device:
    device_kind = "a device"

    def __init__(self, **stats):
        self.memory_stats = lambda: stats


def engine_of(name, **options):
    return jaxcp.Engine(jaxcp.load(FIXTURES / name)[0], None, **({"max_len": 200} | options))


@pytest.mark.parametrize(
    ("name", "axes"),
    slow_but(
        itertools.product(
            ["gpt-oss-tiny", "hy3-tiny", "deepseek-v4-tiny"], [{}, {"seq": 2, "model": 2}]
        ),
        lambda case: case == ("hy3-tiny", {"seq": 2, "model": 2}),
    ),
)
def test_a_pool_fills_the_bytes_that_it_is_given(name, axes, mesh_of, caplog):
    if axes:
        mesh_of(**axes)
    with caplog.at_level(logging.INFO, logger="jaxcp"):
        engine = engine_of(name, memory=3_000_000, max_rows=2)
    held, g = engine.runner.pool.bytes_per_device(), engine.geometry
    beside = engine.runner.seats.said, engine.runner.seats.allowed
    held += sum(x.nbytes for x in jax.tree.leaves(beside))
    page = engine.runner.pool.bytes_of(1 / g.pages_per_shard, 0)
    assert 3_000_000 - page < held <= 3_000_000
    assert f"pool: {g.pool_tokens:,} tokens in pages of 32, 0.003 GiB a device" in caplog.text
    assert g.pool_tokens == g.shards * g.pages_per_shard * 32
    session = engine.session()
    assert len(list(session.send([1, 2, 3], max_new_tokens=3))) == 3
    assert 0 < session.stats.cache_bytes_per_device < held


def test_a_fraction_is_of_what_is_free(monkeypatch):
    free = Device(bytes_limit=5_000_000, bytes_in_use=1_000_000)
    monkeypatch.setattr(jax, "local_devices", lambda: [free])
    assert 1_960_000 < engine_of("hy3-tiny", memory=0.5).runner.pool.bytes_per_device() <= 2_000_000


def test_what_does_not_tell_is_asked_for_bytes():
    with pytest.raises(ValueError, match="does not tell how much memory it has: give memory in"):
        engine_of("hy3-tiny", memory=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 1000}, r"one request of max_len takes [\d,]+ bytes a device; memory is 1,000"),
        ({"memory": 1.0}, "memory must be bytes of a device .* got 1.0"),
        ({"memory": True}, "memory must be an integer; got True"),
        ({"max_len": 10**30}, r"max_len must be in 1\.\.[0-9]+"),
        ({"max_rows": 10**30}, r"max_rows must be in 1\.\.2147483647; got 10"),
        ({"pool_tokens": 10**30}, r"pool_tokens must be in 1\.\.2147483647; got 10"),
        ({"memory": "8G"}, "memory must be bytes of a device .* got '8G'"),
        ({"memory": 10**6, "pool_tokens": 10}, "by pool_tokens or by memory; give one"),
    ],
)
def test_what_is_no_memory(options, message):
    with pytest.raises(ValueError, match=message):
        engine_of("hy3-tiny", **options)
    model, _ = jaxcp.load(FIXTURES / "hy3-tiny")
    with pytest.raises(ValueError, match=r"tokenizer must be the second of what .* got str"):
        jaxcp.Engine(model, "gpt2", max_len=8)


@pytest.mark.parametrize(("max_len", "tokens"), [(100, 416), (10_000, 32_768), (40_000, 40_000)])
def test_without_a_word_there_is_room_for_one_or_for_several(max_len, tokens):
    options = {"pool_tokens": None, "memory": None, "cache_dtype": None}
    model = jaxcp.load(FIXTURES / "hy3-tiny")[0]
    assert geometry_of(model, max_len=max_len, max_rows=2, **options).pool_tokens == tokens
