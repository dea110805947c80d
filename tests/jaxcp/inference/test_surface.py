# SPDX-License-Identifier: Apache-2.0
"""Every option of the surface beside every other: meshes, rows, pads, first and second turn.

Two options at a time (`pairwise`; in `make test` each one), on a model that has a window, experts
and n-grams. What is right comes from one pass over the whole sequence on one device, and from the
definition of sampling.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from pairwise import each_value, pairwise
from slow import slow_but

import jaxcp
from jaxcp.inference.sampling import Sampler
from jaxcp.models.hybrid_moe.config import NGramConfig
from jaxcp.text.tokenizer import byte_level
from jaxcp.training import read_metrics
from jaxcp.weights.placement import place

CONFIG = jaxcp.HybridMoEConfig(
    vocab_size=256, num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
    mlp_dim=16, moe_dim=8, num_experts=4, num_experts_per_tok=2, layer_pattern="LN", window=24,
    ngram=NGramConfig(width=3, dim=4),
)  # fmt: skip
LENGTH = 120
CLOSE = {"atol": 3e-5, "rtol": 0}
MESHES = ({}, {"seq": 2}, {"data": 2}, {"seq": 2, "model": 2})
STRATEGIES = (None, jaxcp.AllGather())


@functools.cache
def alone():
    return jaxcp.HybridMoE(CONFIG, rngs=nnx.Rngs(0))


def on(axes, mesh_of):
    """The model under a mesh of these axes; of none, on one device."""
    if not axes:
        return alone()
    mesh_of(**axes)
    return place(alone())


TOKENS = np.random.default_rng(0).integers(0, 256, (2, LENGTH))


@functools.cache
def whole():
    return np.asarray(jaxcp.logits(alone(), TOKENS))


@functools.cache
def logits_after(ids: tuple[int, ...]):
    """Logits `[V]` of the next token; pads behind it change nothing, and share a program."""
    row = np.pad(ids, (0, LENGTH - len(ids)))[None].repeat(2, 0)
    return jaxcp.logits(alone(), row)[:1, len(ids) - 1]


def cases(factors, allowed=lambda case: True):
    """Every two values that meet; those that `make test` has time for meet every value once."""
    every = pairwise(factors, allowed)
    quick = each_value(every)
    return slow_but(every, lambda case: case in quick)


def named(case):
    return str([*case.values()])


def rows_fit(case):
    return case["rows"] % case["axes"].get("data", 1) == 0


CACHES = {
    "axes": MESHES,
    "strategy": STRATEGIES,
    "rows": (1, 2),
    "ragged": (False, True),
    "donate": (True, False),
    "second": (5, 70),  # tokens of the second turn: the same on every shard, and spread over them
}


@pytest.mark.parametrize(
    "case", cases(CACHES, lambda c: rows_fit(c) and c["rows"] >= 1 + c["ragged"]), ids=named
)
def test_prefill_and_decode_step(case, mesh_of):
    """Two turns and two tokens, ragged ones with pads, against the whole sequence."""
    whole()
    rows, model = case["rows"], on(case["axes"], mesh_of)
    options = {"strategy": case["strategy"], "donate": case["donate"]}
    cache, ends = model.init_cache(rows, LENGTH), np.zeros(rows, int)
    for width in (33, case["second"]):
        lengths = width - 3 * np.arange(rows) if case["ragged"] else np.full(rows, width)
        block = np.full((rows, width), 255)
        for b, (end, n) in enumerate(zip(ends, lengths, strict=True)):
            block[b, :n] = TOKENS[b, end : end + n]
        told, ends = {"lengths": lengths} if case["ragged"] else {}, ends + lengths
        logits, after = jaxcp.prefill(model, cache, block, **told, **options)
        assert case["donate"] or not cache.lengths.is_deleted()
        cache = after
        np.testing.assert_allclose(logits, whole()[np.arange(rows), ends - 1], **CLOSE)
    for _ in range(2):
        token = TOKENS[np.arange(rows), ends]
        logits, cache = jaxcp.decode_step(model, cache, token, donate=case["donate"])
        np.testing.assert_allclose(logits, whole()[np.arange(rows), ends], **CLOSE)
        ends = ends + 1
    assert np.asarray(cache.lengths).tolist() == ends.tolist()


WHOLE = {"axes": MESHES, "strategy": STRATEGIES, "rows": (1, 2), "length": (7, LENGTH)}


@pytest.mark.parametrize("case", cases(WHOLE, rows_fit), ids=named)
def test_logits(case, mesh_of):
    expected = whole()[: case["rows"], : case["length"]]
    model = on(case["axes"], mesh_of)
    tokens = TOKENS[: case["rows"], : case["length"]]
    found = jaxcp.logits(model, tokens, strategy=case["strategy"])
    np.testing.assert_allclose(found, expected, **CLOSE)


SENT = {
    "axes": ({}, {"seq": 2}, {"seq": 2, "model": 2}),
    "temperature": (0.0, 0.8),
    "top_k": (None, 5),
    "top_p": (1.0, 0.6),
    "text": (True, False),
    "stops": (False, True),
    "strategy": (None, jaxcp.AllGather()),
}


def answer_by_definition(ids, count, sampler, stop):
    """Tokens of an answer, each drawn from one pass over all before, and the one that ends it."""
    answer = []
    while len(answer) < count:
        said = (*ids, *answer)
        key = jax.random.fold_in(jax.random.key(7), len(said) - 1)
        token = int(sampler(logits_after(said), key)[0])
        if token == stop:
            return answer, token
        answer.append(token)
    return answer, None


@pytest.mark.parametrize("case", cases(SENT), ids=named)
def test_send(case, mesh_of):
    """Two turns and a fork: what is said, where it stops, and what is counted."""
    prompts = b"the first turn, of some length", b"second", b"fork"
    names = "temperature", "top_k", "top_p"
    options = {name: case[name] for name in names}
    sampler, said, expected = Sampler(**options), [], []
    stop = None
    if case["stops"]:  # the third token of the first answer
        stop = answer_by_definition([*prompts[0]], 4, sampler, None)[0][2]
    for prompt in prompts:
        said += prompt
        answer, ended = answer_by_definition(said, 4, sampler, stop)
        said += answer + [ended] * (ended is not None)
        expected.append(answer)
    assert not case["stops"] or len(expected[0]) < 4

    model = on(case["axes"], mesh_of)
    tokenizer = byte_level() if case["text"] else None
    stops = () if stop is None else (stop,)
    engine = jaxcp.Engine(
        model, tokenizer, max_len=LENGTH, strategy=case["strategy"], stop_tokens=stops
    )
    session = engine.session(seed=7)
    for prompt, answer in zip(prompts, expected, strict=True):
        if prompt == b"fork":
            session = session.fork()
        text = prompt.decode() if case["text"] else list(prompt)
        pieces = list(session.send(text, max_new_tokens=4, **options))
        if case["text"]:
            assert "".join(pieces) == tokenizer.decode(answer)
        else:
            assert pieces == answer
        assert session.stats.generated == len(answer)
    assert session.stats.turns == 3 and session.stats.tokens == len(said) - 1


TRAINED = {
    "axes": ({}, {"seq": 2}, {"data": 2, "model": 2}),
    "strategy": (None, jaxcp.AllGather(), jaxcp.Ring(layout=jaxcp.Balanced())),
    "accumulate": (1, 2),
    "remat": (False, True),
    "seq_len": (31, 32),  # one that needs a pad on two shards
    "packed": (False, True),
}


class Packed:
    """Rows of two documents, whose second begins at a third of the row."""

    def batch(self, step, rows, length):
        tokens = np.random.default_rng(step).integers(0, 256, (rows, length + 1))
        segments = np.broadcast_to(
            (np.arange(length) >= length // 3).astype(np.int32), (rows, length)
        )
        positions = np.arange(length) - np.where(segments, length // 3, 0)
        targets = tokens[:, 1:].copy()
        targets[:, length // 3 - 1] = -1
        batch = {"tokens": tokens[:, :-1], "targets": targets, "segment_ids": segments}
        return batch | {"positions": positions.astype(np.int32)}


def trained(folder, case):
    """Losses and gradient norms of two steps."""
    config = jaxcp.TrainConfig(
        model=jaxcp.GPTConfig(
            vocab_size=256, max_positions=32, num_layers=1, num_heads=2, embed_dim=8,
            remat=case["remat"],
        ),
        mesh=jaxcp.MeshConfig(**case["axes"]), strategy=case["strategy"],
        seq_len=case["seq_len"], batch_size=4, steps=2, log_every=1,
        accumulate=case["accumulate"], data=Packed() if case["packed"] else jaxcp.TextSource(),
        out_dir=folder,
    )  # fmt: skip
    records = read_metrics(jaxcp.train(config).metrics_path)
    return [(record["loss"], record["grad_norm"]) for record in records]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    """What the same batches give on one device, in one piece, without any option."""
    plain = {"axes": {}, "strategy": None, "accumulate": 1, "remat": False}

    @functools.cache
    def run(seq_len, packed):
        case = plain | {"seq_len": seq_len, "packed": packed}
        return trained(tmp_path_factory.mktemp("plain"), case)

    return run


def documents_if_balanced(case):
    return case["packed"] or case["strategy"] != TRAINED["strategy"][-1]


@pytest.mark.parametrize("case", cases(TRAINED, documents_if_balanced), ids=named)
def test_train(case, plainly, tmp_path):
    expected = plainly(case["seq_len"], case["packed"])
    np.testing.assert_allclose(trained(tmp_path, case), expected, rtol=2e-5)
