# SPDX-License-Identifier: Apache-2.0
"""Conversations are rendered as the publishers' own code rendered them once.

rendered.jsonl has what transformers 5.24 made of the templates of Hy3, Qwen3 and gpt-oss, and what
two public encoders made for DeepSeek-V3.2 (that of SGLang 0.5.23) and V4 (renderers 0.1.12).
`test_hf_chat.py` asks transformers anew, with more of them.
"""

import json
import re

import pytest
from chat_folders import MODELS, text_of, tokenizer_of
from conversations import TOOLS

CASES = [json.loads(line) for line in text_of("rendered.jsonl").splitlines()]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered")
    return {model: tokenizer_of(folder / model, model).chat for model in MODELS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["model"])
def test_what_was_rendered(chats, case):
    tools = {"both": TOOLS, "first": TOOLS[:1], None: None}[case["tools"]]
    chat = chats[case["model"]]
    prompt = chat.prompt(case["messages"], tools, case["thinking"])
    assert re.sub(r"(Current date: )[\d-]+", r"\1TODAY", prompt.text) == case["text"]
    read = chat.tokenizer.encode(prompt.text, read_control_tokens=True).tolist()
    assert prompt.ids == read, "no message has control tokens"


def test_all_models_are_there():
    assert {case["model"] for case in CASES} == {*MODELS} - {"hy3-released"}
    assert any(case["messages"][0]["role"] == "system" for case in CASES)
    assert any(case["messages"][-1]["role"] == "assistant" for case in CASES)
    assert any("reasoning" in message for case in CASES for message in case["messages"])
    assert any(message["role"] == "tool" for case in CASES for message in case["messages"])
