# SPDX-License-Identifier: Apache-2.0
"""Results of tools go back in each model's own form, beside the calls that asked for them."""

import pytest
from chat_folders import MODELS, tokenizer_of
from conversations import TOOLS

USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return {model: tokenizer_of(folder / model, model).chat for model in MODELS}


def calling(*names, **fields):
    """An assistant's message that calls `stop` once for each of these ids."""
    function = {"name": "stop", "arguments": '{"a": 1}'}
    calls = [{"id": name, "type": "function", "function": function} for name in names]
    return {"role": "assistant", "content": None, "tool_calls": calls, **fields}


def result(name, content):
    return {"role": "tool", "tool_call_id": name, "content": content}


def after(chat, *messages):
    """What is rendered behind the user's first message, up to the model's next turn."""
    return chat.prompt([USER, *messages], TOOLS).text.rpartition("Hi")[2]


CALL = '<|start|>assistant to=functions.stop<|channel|>commentary json<|message|>{"a": 1}<|call|>'
SAID = '<|start|>functions.stop to=assistant<|channel|>commentary<|message|>"{}"<|end|>'


def test_gpt_oss_has_each_result_behind_its_call(chats):
    chat = chats["gpt-oss"]
    text = after(chat, calling("x", "y"), result("y", "second"), result("x", "first"))
    first, second = SAID.format("first"), SAID.format("second")
    assert text == f"<|end|>{CALL}{first}{CALL}{second}<|start|>assistant"
    unnamed = calling("x", "y")
    for call in unnamed["tool_calls"]:
        del call["id"]
    assert after(chat, unnamed, result("1", "first"), result("2", "second")) == text


def test_gpt_oss_keeps_what_is_said_beside_a_call(chats):
    text = after(chats["gpt-oss"], calling("x", reasoning="hm", content="So"), result("x", "r"))
    assert text.startswith("<|end|><|start|>assistant<|channel|>analysis<|message|>hm\n\nSo<|end|>")


def test_gpt_oss_has_one_place_for_systems(chats):
    chat, system = chats["gpt-oss"], {"role": "system", "content": "A"}
    both = chat.prompt([system, {"role": "developer", "content": "B"}, USER]).text
    assert "# Instructions\n\nA\n\nB\n\n<|end|>" in both
    with pytest.raises(ValueError, match=r"no place for messages\[1\]"):
        chat.prompt([USER, system, USER])
    with pytest.raises(ValueError, match="no previous assistant message with a tool call"):
        chat.prompt([USER, result("x", "r")])


def test_deepseek_v4_has_results_in_the_order_of_calls(chats):
    text = after(
        chats["deepseek-v4"], calling("x", "y"), result("y", "second"), result("x", "first"), USER
    )
    assert text == "<｜Assistant｜><think>"
    whole = chats["deepseek-v4"].prompt(
        [USER, calling("x", "y"), result("y", "2"), result("x", "1"), USER], TOOLS
    ).text  # fmt: skip
    results = "<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>\n\nHi"
    assert whole.endswith(f"<｜User｜>{results}<｜Assistant｜><think>")


def test_deepseek_v32_closes_the_results_behind_the_last(chats):
    chat = chats["deepseek-v32"]
    text = after(chat, calling("x", "y"), result("x", "1"), result("y", "2"))
    end = "<function_results>\n<result>1</result>\n<result>2</result>\n</function_results>\n\n"
    assert text.endswith(f"<｜end▁of▁sentence｜>\n\n{end}</think>")
    with pytest.raises(ValueError, match="have 1 calls before 2 results"):
        after(chat, calling("x"), result("x", "1"), result("x", "2"))


@pytest.mark.parametrize("model", MODELS)
def test_all_results_are_there(chats, model):
    text = after(chats[model], calling("x", "y"), result("x", "first"), result("y", "second"))
    assert text.index("first") < text.index("second")
