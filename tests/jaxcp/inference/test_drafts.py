# SPDX-License-Identifier: Apache-2.0
"""Drafts by a model's own layer: those of one pass over all of a text, and never other answers."""

import contextlib
import dataclasses
import functools
import math
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from slow import slow_but
from tiny_checkpoints import FIXTURES, random_model

import jaxcp
from jaxcp import Sampling
from jaxcp.inference import guesses
from pallas_kernels import PAD_POSITION

HY3, LATENTS, SELECTED, BLOCKS, RECURRENT = (
    "hy3-tiny", "deepseek-v3-tiny", "deepseek-v32-tiny", "deepseek-v4-tiny", "qwen3-next-tiny",
)  # fmt: skip
WINDOWED = "mimo-v2-flash-tiny"
WIDTH = 192
LENGTHS = 5, 40, 150, 90
NEW = Sampling(max_new_tokens=14)


def mesh(axes):
    """The mesh as a context; none where there are no axes."""
    if not axes:
        return contextlib.nullcontext()
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.set_mesh(jaxcp.make_mesh(**axes, devices=devices))


@functools.cache
def checkpoint(name):
    """A checkpoint of random weights, as that of the name but for a layer that drafts."""
    config = jaxcp.load_config(FIXTURES / name)
    if name == BLOCKS:  # one layer of each kind
        kinds = {"num_layers": 3, "layer_kinds": config.layer_kinds[:3]}
        config = dataclasses.replace(config, **kinds)
    if name == WINDOWED:
        config = dataclasses.replace(config, mtp_kind="L")
    folder = tempfile.mkdtemp()
    jaxcp.save(random_model(dataclasses.replace(config, num_mtp_layers=1)), folder)
    return folder


def engine_of(name, *, folder=checkpoint, **options):
    model, _ = jaxcp.load(folder(name))
    options = {"max_len": WIDTH, "max_rows": 2, "stop_tokens": (), "max_wait": math.inf} | options
    return jaxcp.Engine(model, None, **options)


@functools.cache
def engine_alone(name):
    return engine_of(name, drafts=3)


@functools.partial(jax.jit, static_argnames="count")
def of_one_pass(model, ids, length, count):
    """Drafts behind the text `ids[:, :length]`, whose last token is not computed."""
    place = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
    state, following, drafted, found = None, jnp.roll(ids, -1, axis=1), None, []
    for n in range(count):
        last = length - 2 + n
        positions = jnp.where(place <= last, place, PAD_POSITION)
        if n == 0:
            state, _ = model.trunk(ids, positions, model.attend_over(positions))
        else:  # one place more: what was drafted, and the token that it says
            state = state.at[:, last].set(drafted)
            following = following.at[:, last].set(found[-1])
        states = model.draft(state, following, positions, model.attend_over(positions))
        drafted = lax.dynamic_index_in_dim(states, last, 1, keepdims=False)
        logits = model.logits(model.drafted(drafted[:, None]))[:, 0]
        found.append(logits.argmax(-1).astype(jnp.int32))
    return jnp.concatenate(found)


def expected(model, text, count):
    ids = jnp.asarray([text + [0] * (WIDTH - len(text))], jnp.int32)
    return of_one_pass(model, ids, len(text), count).tolist()


@pytest.mark.parametrize(
    ("name", "axes"),
    slow_but(
        [
            (HY3, {}),
            (HY3, {"seq": 3}),
            (HY3, {"data": 2, "seq": 2}),
            (LATENTS, {"seq": 2, "model": 2}),
            (SELECTED, {}),
            (BLOCKS, {}),
            (RECURRENT, {}),
            (RECURRENT, {"seq": 3}),
            (RECURRENT, {"data": 2, "model": 2}),
            ("qwen3-5-moe-tiny", {"seq": 2, "expert": 2}),
            (WINDOWED, {}),
            (WINDOWED, {"seq": 3}),
        ],
        lambda case: case == (HY3, {}),
    ),
)
def test_drafts_are_those_of_one_pass(name, axes, monkeypatch):
    """Behind a prompt in one chunk and in several, a decode step, right guesses and wrong ones."""
    alone, _ = jaxcp.load(checkpoint(name))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, n).tolist() for n in LENGTHS[: 2 + len(axes)]]
    answers = [result.tokens for result in engine_of(name).generate(texts, NEW)]
    whole = [text + answer for text, answer in zip(texts, answers, strict=True)]

    def right(tokens, most):
        """Give what comes, at every third place; else nothing, and the drafts are tried."""
        known = tokens.tolist()
        text = next(text for text in whole if text[: len(known)] == known)
        return text[len(known) :][:most] if len(known) % 3 == 0 else []

    monkeypatch.setattr(guesses, "followers", right)
    drafted = []
    with mesh(axes):
        engine = engine_of(name, drafts=3) if axes else engine_alone(name)
        requests = [engine.add(text, NEW) for text in texts]
        while not all(request.done for request in requests):
            engine.step()
            drafted += [
                (request.tokens.tolist(), request.guesses.drafted)
                for request in requests
                if not request.done and request.guesses.drafted
            ]
    for text, found in drafted:
        assert found == expected(alone, text, 3)[: len(found)]
    assert [request.answer for request in requests] == answers
    assert sum(request.stats.accepted for request in requests) > 4 and len(drafted) > 8


def test_a_draft_goes_no_further_than_its_pages(monkeypatch):
    """At the end of a page there is no place for what the layer would keep of its own draft."""
    monkeypatch.setattr(guesses, "followers", lambda tokens, most: [])
    engine = engine_alone(HY3)
    page = engine.geometry.page_size
    text = np.random.default_rng(1).integers(0, 256, page - 1).tolist()
    request = engine.add(text, NEW)
    lengths = {}
    while not request.done:
        engine.step()
        if request.guesses.drafted:
            lengths[len(request.tokens)] = len(request.guesses.drafted)
    assert lengths[page + 1] == 1 and max(lengths.values()) == 3


def test_a_model_without_such_a_layer_has_no_drafts_and_no_pages_for_them():
    engine = engine_of("qwen3-moe-tiny", drafts=3, folder=FIXTURES.joinpath)
    other = engine_of(HY3)
    for one in (engine, other):
        assert not one.geometry.drafting and "mtp" not in one.runner.pool.layers
    drafting = engine_of(HY3, drafts=5)
    assert drafting.geometry.drafting == 3 and "mtp" in drafting.runner.pool.layers
