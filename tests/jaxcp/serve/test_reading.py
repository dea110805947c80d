# SPDX-License-Identifier: Apache-2.0
"""Tokens become the same events however many of them a step brings."""

import pytest
from tiny_chat import tokenizer_of

from jaxcp.serve.answers import Ending, Piece
from jaxcp.serve.blocks import Blocks
from jaxcp.serve.events import End
from jaxcp.serve.reading import ChatReader, PlainReader

USER = [{"role": "user", "content": "Who is Pierre?"}]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "find", "arguments": {"name": "Пьер END"}}\n</tool_call>'
ANSWERS = {
    "thinking and two calls": f"<think>\nhm END\n</think>\n\nI ask.\n{CALL}\n{CALL}",
    "a stop string": "<think>\nhm END\n</think>\n\nI say é EN and END of it",
    "half a call": f"So:\n{CALL}\n{CALL[:-20]}",
    "tags that are none": "a <tool_call> b </think> c <think> d",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


def said(reader, pieces):
    """The blocks of an answer that comes in these pieces: kind, text and name; and its end."""
    blocks, ends = Blocks(), []
    for number, tokens in enumerate(pieces):
        ending = Ending("stop") if number == len(pieces) - 1 else None
        if not reader.stopped:
            for event in reader.take(Piece(0, 0, list(tokens), [], ending)):
                ends += [event] * isinstance(event, End)
                for _ in blocks.take(event):
                    pass
    return [(x.kind, x.text, x.name, x.id) for x in blocks.all], ends, reader.generated


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_every_split_of_an_answer_says_the_same(tokenizer, answer):
    """Speculation brings several tokens at once (vllm-project/vllm#41967, #43221)."""
    ids = tokenizer.encode(answer, read_control_tokens=True).tolist()
    prompt = tokenizer.chat.prompt(USER, tools=[TOOL])
    alone = said(ChatReader(prompt, ["END"]), [[token] for token in ids])
    assert alone[0] and len(alone[1]) == 1
    for at in range(len(ids) + 1):
        assert said(ChatReader(prompt, ["END"]), [ids[:at], ids[at:]]) == alone
    text = "".join(part for kind, part, *_ in alone[0] if kind == "text")
    assert "END" not in text


def test_the_end_names_the_stop_string(tokenizer):
    ids = tokenizer.encode("I say é EN and END of it").tolist()
    prompt = tokenizer.chat.prompt(USER)
    _, [end], generated = said(ChatReader(prompt, ["never", "END", "EN and END"]), [ids])
    assert (end.reason, end.stop) == ("stop", "EN and END") and generated < len(ids)
    _, [end], _ = said(ChatReader(prompt, ["never"]), [ids])
    assert (end.reason, end.stop) == ("stop", None)


def test_plain_text_ends_with_what_was_kept_back(tokenizer):
    ids = tokenizer.encode("до 🎈").tolist()
    for at in range(len(ids) + 1):
        blocks, _, generated = said(PlainReader(tokenizer, ["🎈 never"]), [ids[:at], ids[at:]])
        assert [text for _, text, *_ in blocks] != [] and generated == len(ids)
        assert "".join(text for _, text, *_ in blocks) == "до 🎈"
