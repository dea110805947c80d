# SPDX-License-Identifier: Apache-2.0
"""Logits are changed as the rules say (`sampling_rules`), on every mesh and at their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from sampling_rules import changed

from jaxcp.inference.penalties import counted, nothing_said, penalized, said_by, with_row
from jaxcp.inference.sampling import NOT_FINITE, RowOptions, Sampling, sample_rows

V, ROWS = 40, 6
EVERY = [
    Sampling(repetition_penalty=1.7),
    Sampling(repetition_penalty=0.6, presence_penalty=-1.5),
    Sampling(presence_penalty=2, frequency_penalty=0.3),
    Sampling(frequency_penalty=-2.0, logit_bias={0: 2.5, V - 1: -100, 7: -0.25}),
    Sampling(temperature=0.9, top_k=3),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.7, logit_bias={3: 1}, min_p=0.2, seed=4),
]
jitted, write = jax.jit(penalized), jax.jit(with_row)


def options_of(every):
    """Arrays, one number a row."""
    rows = zip(*(sampling.row_options() for sampling in every), strict=True)
    return RowOptions(*map(jnp.asarray, rows))


def drawn_at_random(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(EVERY), V)).astype(np.float32) * 4
    texts = [
        (rng.integers(0, V, 9).tolist(), rng.integers(0, V // 2, n).tolist())
        for n in (0, 1, 30, 12, 5, 8)
    ]
    return logits, texts


def said_of(texts, lines, every=EVERY):
    """Place them as a runner has them: rows over `data`."""
    said, empty = nothing_said(ROWS, V), jax.sharding.get_abstract_mesh().empty
    said = said if empty else jax.device_put(said, P("data"))
    for line, text, sampling in zip(lines, texts, every, strict=True):
        said = write(said, said_by(*text, sampling, V), line)
    return said


@pytest.mark.parametrize("axes", [{}, {"seq": 2}, {"model": 2}], ids=str)
def test_the_rules(axes, mesh_of):
    if axes:
        mesh_of(**axes)
    options, lines = options_of(EVERY), np.array([3, 0, 5, 1, 2, 4])
    for seed in range(5):
        logits, texts = drawn_at_random(seed)
        placed = jax.device_put(logits, P(None, "model")) if axes else logits
        ours = jitted(placed, said_of(texts, lines), lines, options)
        for row, text, sampling, logit in zip(ours, texts, EVERY, logits, strict=True):
            np.testing.assert_allclose(row, changed(logit, *text, sampling), rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(ours[4], logits[4])


@pytest.mark.parametrize("axes", [{}, {"seq": 2}], ids=str)
def test_tokens_are_counted_as_they_are_sampled(axes, mesh_of):
    """To the same bits as if the row were written anew with the whole answer."""
    if axes:
        mesh_of(**axes)
    _, texts = drawn_at_random(0)
    lines, options = np.array([3, 0, 5, 1, 2, 4]), options_of(EVERY)
    said, count = said_of(texts, lines), jax.jit(counted)
    rounds = np.random.default_rng(1).integers(0, 9, (20, len(EVERY)))
    for tokens in rounds:
        said = count(said, lines, tokens, options)
    longer = [
        (prompt, [*answer, *rounds[:, i].tolist()]) for i, (prompt, answer) in enumerate(texts)
    ]
    longer[4] = texts[4]  # without a penalty: not counted
    for one, other in zip(said, said_of(longer, lines), strict=True):
        np.testing.assert_array_equal(one, other)
    after = count(said, lines, np.full(len(EVERY), NOT_FINITE), options)
    np.testing.assert_array_equal(after.counts, said.counts)


def test_a_bias_forces_a_token_or_bans_it():
    logits = np.random.default_rng(0).normal(size=(2, V)).astype(np.float32) * 9
    best = logits.argmax(-1)
    every = [Sampling(logit_bias={5: 100.0}), Sampling(logit_bias={int(best[1]): -100})]
    lines = np.array([0, 1])
    ours = jitted(logits, said_of([([1], [])] * 2, lines, every), lines, options_of(every))
    assert ours[0].argmax() == 5 and ours[1].argmax() == np.argsort(logits[1])[-2]


def test_what_is_finite_stays_so_and_what_is_not_is_seen():
    """The largest numbers that options may be; and logits that a model should not make."""
    largest = float(np.finfo(np.float32).max)
    every = [
        Sampling(logit_bias={0: largest, 1: -largest}, repetition_penalty=1e-30),
        Sampling(logit_bias={0: -largest, 1: largest}, repetition_penalty=1e30),
    ]
    options, lines = options_of(every), np.array([0, 1])
    said = said_of([([0, 1], [0, 1])] * 2, [0, 1], every)
    logits = np.random.default_rng(0).normal(size=(2, V)).astype(np.float32) * 1e38
    ours = jitted(logits, said, lines, options)
    assert np.isfinite(ours).all()
    best = [changed(logits[i], [0, 1], [0, 1], every[i]).argmax() for i in (0, 1)]
    assert sample_rows(ours, lines, options).tolist() == best
    for wrong in (np.nan, np.inf):
        spoiled = logits.copy()
        spoiled[1, 0] = wrong
        ours = jitted(spoiled, said, lines, options)
        assert sample_rows(ours, lines, options).tolist() == [best[0], NOT_FINITE]
    logits[:, 2:] = -np.inf  # what the model rules out
    assert (jitted(logits, said, lines, options)[:, 2:] == -np.inf).all()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_is_sampled_as_it_is_alone(temperature):
    logits, texts = drawn_at_random(3)
    every = [
        Sampling(temperature=temperature, min_p=i / 99, seed=2**32 - 1 - i,
                 repetition_penalty=1 + i / 5, logit_bias={i: i})
        for i in range(6)
    ]  # fmt: skip
    lines, positions = np.arange(6), np.arange(10, 16)
    said = said_of(texts, lines, every)

    @jax.jit
    def sampled(logits, lines, positions, options):
        return sample_rows(penalized(logits, said, lines, options), positions, options)

    rows = logits, lines, positions, options_of(every)
    together = sampled(*rows).tolist()
    alone = [int(sampled(*jax.tree.map(lambda x, i=i: x[i : i + 1], rows))[0]) for i in range(6)]
    assert together == alone and len(set(together)) > 1


@pytest.mark.slow
def test_as_the_processors_of_transformers():
    """To the last bit but one, in the order in which `generate` has them."""
    transformers = pytest.importorskip("transformers", reason="pip install 'jaxcp[hf]'")
    torch = pytest.importorskip("torch", reason="pip install 'jaxcp[hf]'")
    for seed in range(20):
        logits, texts = drawn_at_random(seed)
        rng = np.random.default_rng(seed)
        biases = {int(i): float(rng.normal()) for i in rng.integers(0, V, 4)}
        factor, min_p = rng.uniform(0.3, 3), rng.uniform(0.01, 0.9)
        sampling = Sampling(
            repetition_penalty=factor, logit_bias=biases, min_p=min_p, temperature=1.5
        )
        ids = torch.tensor([[*texts[3][0], *texts[3][1]]])
        theirs = torch.from_numpy(logits[:1])
        for processor in (
            transformers.SequenceBiasLogitsProcessor({(i,): b for i, b in biases.items()}),
            transformers.RepetitionPenaltyLogitsProcessor(factor),
        ):
            theirs = processor(ids, theirs)
        said = said_of(texts[3:4], [0], [sampling])
        ours = jitted(logits[:1], said, np.array([0]), options_of([sampling]))
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=3e-7)
        for warper in (
            transformers.TemperatureLogitsWarper(1.5),
            transformers.MinPLogitsWarper(min_p),
        ):
            theirs = warper(ids, theirs)
        kept = {i for i in range(V) if theirs[0, i].isfinite()}
        draws = 400
        rows = np.tile(ours, (draws, 1))
        options = RowOptions(*(np.tile(x, draws) for x in options_of([sampling])))
        drawn = set(sample_rows(rows, np.arange(draws), options).tolist())
        assert drawn <= kept and len(drawn) >= min(len(kept), 2)


@pytest.mark.parametrize(
    "field, values, message",
    [
        ("repetition_penalty", [0, -1, float("nan"), float("inf"), "1", True, None], "positive"),
        ("presence_penalty", [2.1, -2.1, float("nan"), "0", None, False], r"in \[-2, 2\]"),
        ("frequency_penalty", [2.1, -2.1, float("nan"), "0", None, False], r"in \[-2, 2\]"),
        ("min_p", [-0.1, 1.1, float("nan"), "0", None, True], r"in \[0, 1\]"),
        ("logit_bias", [None, [1], 3, "ab"], "must be a dict of ids"),
        ("logit_bias", [{-1: 1}, {"5": 1}, {1.0: 1}, {2**31: 1}, {True: 1}], "an id of logit_bias"),
        ("logit_bias", [{1: float("nan")}, {1: 1e39}, {1: "1"}, {1: True}], "must be finite"),
    ],
)  # fmt: skip
def test_what_is_no_option(field, values, message):
    for value in values:
        with pytest.raises(ValueError, match=rf"{field}.*{message}|{message}.*{field}|{message}"):
            Sampling(**{field: value})


def test_a_sampling_keeps_its_own_biases():
    biases = {1: 2}
    sampling = Sampling(logit_bias=biases)
    biases[1] = 5
    assert sampling.logit_bias == {1: 2.0} and sampling.penalizes
    assert hash(sampling) == hash(Sampling(logit_bias={1: 2.0})) and not Sampling().penalizes
