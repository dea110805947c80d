# SPDX-License-Identifier: Apache-2.0
"""Lets a random model say what a test needs, where an interface has no field for grammars."""

import dataclasses

from tiny_chat import saying


def force(engine, monkeypatch, text):
    """From now on every answer of the engine is `text`, control tokens among it."""
    requests, grammar = engine.requests, saying(engine.tokenizer, text)

    def forced(ids, sampling):
        return requests(ids, dataclasses.replace(sampling, grammar=grammar))

    monkeypatch.setattr(engine, "requests", forced)
