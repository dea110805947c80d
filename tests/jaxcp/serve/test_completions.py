# SPDX-License-Identifier: Apache-2.0
"""`/v1/completions`, against the engine alone."""

import numpy as np
import pytest

import jaxcp
from jaxcp import Sampling
from jaxcp.text.generation import Defaults

PROMPT = "The needle is"


def text_of(chunks, choice=0):
    parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice]
    return "".join(part["text"] for part in parts)


def test_an_answer_is_the_engines(server, engine):
    body = server.complete(PROMPT, max_tokens=12)
    server.idle()
    alone = engine.generate([PROMPT], Sampling(max_new_tokens=12))[0]
    [choice] = body["choices"]
    assert choice["text"] == alone.text and choice["finish_reason"] == alone.finish_reason
    assert body["object"] == "text_completion" and body["model"] == "tiny"
    assert body["usage"]["prompt_tokens"] == len(PROMPT)
    assert body["usage"]["completion_tokens"] == len(alone.tokens)
    assert body["usage"]["total_tokens"] == len(PROMPT) + len(alone.tokens)
    assert server.stream(PROMPT, max_tokens=12)[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stream_says_what_an_answer_says(server):
    fields = {"max_tokens": 40, "temperature": 1.0, "seed": 7}
    whole = server.complete(PROMPT, **fields)
    chunks = server.stream(PROMPT, stream_options={"include_usage": True}, **fields)
    assert text_of(chunks) == whole["choices"][0]["text"]
    *parts, last = chunks
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 40
    assert all(part["usage"] is None for part in parts)
    assert len({part["id"] for part in chunks}) == 1
    assert [part["choices"][0]["finish_reason"] for part in parts].count("length") == 1


def test_n_answers_have_the_seeds_of_each(server):
    fields = {"max_tokens": 8, "temperature": 1.0}
    several = server.complete(PROMPT, n=3, seed=5, **fields)
    each = [server.complete(PROMPT, seed=5 + i, **fields)["choices"][0]["text"] for i in range(3)]
    assert [choice["text"] for choice in several["choices"]] == each
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    assert several["usage"]["prompt_tokens"] == len(PROMPT)
    assert several["usage"]["completion_tokens"] == 24
    chunks = server.stream(PROMPT, n=3, seed=5, **fields)
    assert [text_of(chunks, i) for i in range(3)] == each


def test_stop_strings_end_the_text_before_them(server):
    whole = server.complete(PROMPT, max_tokens=40)["choices"][0]["text"]
    stop = whole[10:12]
    body = server.complete(PROMPT, max_tokens=40, stop=stop)
    assert body["choices"][0]["text"] == whole[: whole.index(stop)]
    assert body["choices"][0]["finish_reason"] == "stop"
    chunks = server.stream(PROMPT, max_tokens=40, stop=[stop, "never"])
    assert text_of(chunks) == whole[: whole.index(stop)]


def test_what_the_pool_knows_is_counted(server):
    prompt = "A prompt that nobody has sent so far. " * 4
    first, second = (server.complete(prompt, max_tokens=2) for _ in range(2))
    details = [body["usage"]["prompt_tokens_details"] for body in (first, second)]
    assert details[0] == {"cached_tokens": 0}
    assert details[1] == {"cached_tokens": len(prompt) - 1}  # the last one's logits are needed
    longer = server.stream(prompt + "More.", max_tokens=2, stream_options={"include_usage": True})
    assert longer[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt)


def test_log_probabilities_are_the_models(server, engine):
    body = server.complete(PROMPT, max_tokens=6, logprobs=2)
    given = body["choices"][0]["logprobs"]
    server.idle()
    alone = engine.generate([PROMPT], Sampling(max_new_tokens=6, logprobs=2))[0]
    ids = [*map(ord, PROMPT), *alone.tokens]
    logits = np.asarray(jaxcp.logits(engine.model, np.asarray([ids], np.int32))[0], np.float64)
    every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [every[len(PROMPT) - 1 + i, token] for i, token in enumerate(alone.tokens)]
    np.testing.assert_allclose(given["token_logprobs"], expected, atol=1e-4)
    assert all(1 <= len(best) <= 2 for best in given["top_logprobs"])
    assert len(given["tokens"]) == len(given["text_offset"]) == 6
    chunks = server.stream(PROMPT, max_tokens=6, logprobs=2)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    streamed = [x for part in parts if part for x in part["token_logprobs"]]
    np.testing.assert_allclose(streamed, given["token_logprobs"])


def test_a_prompt_that_is_said_again_has_its_log_probabilities(server, engine):
    fields = {"max_tokens": 3, "echo": True, "logprobs": 1}
    choice = server.complete(PROMPT, **fields)["choices"][0]
    given = choice["logprobs"]
    assert "".join(given["tokens"]) == choice["text"] and choice["text"].startswith(PROMPT)
    assert given["token_logprobs"][0] is given["top_logprobs"][0] is None
    scored = engine.score(PROMPT, best=1)
    expected = [one.logprob for one in scored]
    np.testing.assert_allclose(given["token_logprobs"][1 : len(PROMPT)], expected, atol=1e-5)
    assert [*given["top_logprobs"][1].values()] == pytest.approx([scored[0].best[0][1]], abs=1e-5)
    assert given["text_offset"] == [*range(len(choice["text"]))]
    parts = [c["choices"][0]["logprobs"] for c in server.stream(PROMPT, **fields) if c["choices"]]
    assert [x for part in parts if part for x in part["tokens"]] == given["tokens"]


def test_ids_echo_biases_and_penalties(server, engine):
    ids = list(PROMPT.encode())
    text = server.complete(PROMPT, max_tokens=5)["choices"][0]["text"]
    assert server.complete(ids, max_tokens=5)["choices"][0]["text"] == text
    assert server.complete([ids], max_tokens=5, echo=True)["choices"][0]["text"] == PROMPT + text
    assert text_of(server.stream(ids, max_tokens=5, echo=True)) == PROMPT + text
    biased = server.complete(PROMPT, max_tokens=3, logit_bias={"65": 100})
    assert biased["choices"][0]["text"] == "AAA"
    fields = {"presence_penalty": 1.5, "frequency_penalty": 2, "repetition_penalty": 1.5}
    fields |= {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8, "seed": 3}
    given = server.complete(PROMPT, max_tokens=12, **fields)["choices"][0]["text"]
    server.idle()
    assert given == engine.generate([PROMPT], Sampling(max_new_tokens=12, **fields))[0].text


def test_a_regex_and_a_grammar_are_followed(server):
    body = server.complete(PROMPT, max_tokens=30, regex=r"[0-9]{3}-[a-c]+\.")
    text = body["choices"][0]["text"]
    assert text[:3].isdigit() and text[3] == "-" and (text[-1] == "." or len(text) == 30)
    forced = server.complete(PROMPT, max_tokens=30, grammar='start: "yes, " /[0-9]/')
    assert forced["choices"][0]["text"][:5] == "yes, "
    assert forced["choices"][0]["finish_reason"] == "stop"


def test_what_is_left_out_is_as_the_checkpoint_advises(server, engine, monkeypatch):
    fields = {"prompt": PROMPT, "max_tokens": 12}
    greedy = server.complete(PROMPT, max_tokens=12)["choices"][0]["text"]
    monkeypatch.setattr(engine.tokenizer, "defaults", Defaults(temperature=0.0))
    assert server.post("/v1/completions", **fields).json()["choices"][0]["text"] == greedy
    advice = Defaults(temperature=5.0, top_k=1)  # of one token there is one to draw
    monkeypatch.setattr(engine.tokenizer, "defaults", advice)
    assert server.post("/v1/completions", **fields).json()["choices"][0]["text"] == greedy
    drawn = server.post("/v1/completions", **fields, top_k=0, seed=1).json()
    assert drawn["choices"][0]["text"] != greedy


@pytest.mark.parametrize(
    "fields, param, said",
    [
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"n": 0}, "n", "1 to 16"),
        ({"temperature": -1}, "temperature", "temperature must be"),
        ({"top_p": 0}, "top_p", "top_p must be"),
        ({"presence_penalty": 3}, "presence_penalty", "in \\[-2, 2\\]"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "ids of tokens"),
        ({"logit_bias": {"999": 1}}, None, "logit_bias"),
        ({"logprobs": 21}, "logprobs", "0 to 20"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 1025}, "max_tokens", "the context holds 1024 tokens"),
        ({"stop": [""]}, "stop", "a character at least"),
        ({"regex": "["}, "regex", "regex cannot be followed"),
        ({"regex": "a", "grammar": 'start: "a"'}, None, "one grammar"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [1, 100_000]}, "prompt", "100000"),
        ({"prompt": ["a", "b"]}, "a prompt of several texts", "requests of their own"),
        ({"nonsense": 1}, "nonsense", "unknown field `nonsense`"),
        ({"stream_options": {"x": 1}, "stream": True}, "stream_options.x", "unknown field `x`"),
        ({"temperature": "hot"}, "temperature", "Expected"),
        ({"model": "another"}, "model", "is not here"),
        ({"store": True}, "store", "nothing is stored"),
    ],
)
def test_what_cannot_be_done_is_named(server, fields, param, said):
    reply = server.post("/v1/completions", **{"prompt": "a", **fields})
    assert reply.status_code == (404 if param == "model" else 400), reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    with pytest.raises(ValueError, match=said):
        raise ValueError(error["message"])
    streamed = server.post("/v1/completions", **{"prompt": "a", "stream": True, **fields})
    if "stream_options" not in fields:
        assert streamed.status_code == reply.status_code and streamed.json() == reply.json()
