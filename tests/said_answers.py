# SPDX-License-Identifier: Apache-2.0
"""Lets a random model say what a test needs, request by request, and end its turn by a token."""

import dataclasses

from tiny_chat import saying

from jaxcp.inference.asking import Asking

HY3_CALL = (
    "<tool_calls>\n<tool_call>weather<tool_sep>\n<arg_key>city</arg_key>\n"
    "<arg_value>Paris</arg_value>\n</tool_call>\n</tool_calls>"
)
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}},
    }}},
]  # fmt: skip


def say_next(monkeypatch, *texts):
    """Make the next requests of any engine answer with these texts, control tokens among them.

    A request that goes on with an answer takes one of its own; `None` leaves one to the model. Each
    answer ends by the token that ends a turn, its own if it has one there. Returns what is left.
    """
    requests, left = Asking.requests, list(texts)

    def forced(asking, prompt, sampling=None):
        text = left.pop(0) if left else None
        if text is not None:
            sampling = dataclasses.replace(sampling, **_options(asking.tokenizer, text))
        return requests(asking, prompt, sampling)

    monkeypatch.setattr(Asking, "requests", forced)
    return left


def _options(tokenizer, text):
    end = tokenizer.chat.stop_tokens[0]
    for token in tokenizer.chat.stop_tokens:
        name = tokenizer.backend.id_to_token(token)
        if text.endswith(name):
            text, end = text.removesuffix(name), token
    # a stop token may only come where a grammar may end, and one that must end there has none
    return {"grammar": saying(tokenizer, text) + ' "~"?', "logit_bias": {end: 100}}


def begun(engine, **options):
    return engine.session(system="Be kind.", **({"thinking": "high"} | options))


def text_of(session):
    """All that was computed, control tokens among it."""
    return session.engine.tokenizer.backend.decode(session.tokens, skip_special_tokens=False)


def ids_of(engine, text):
    return engine.tokenizer.encode(text, read_control_tokens=True).tolist()


def say(session, text, **options):
    return "".join(session.send(text, **({"max_new_tokens": 24} | options)))
