# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4 is asked to think as its checkpoint's own encoder does, of which there are two.

Expected texts are those of the publisher's `encoding/README.md`, of the tests of vLLM, and, as
SHA-256, the efforts of the package renderers 0.1.12, which follows V4-Flash-0731.
"""

import hashlib

import pytest
from chat_folders import tokenizer_of, write_model

from jaxcp.text.folder import read_tokenizer
from jaxcp.text.thinking import level_of_effort

FIRST = "def encode():\n    raise RuntimeError\nREASONING_EFFORT_MAX = ('Reasoning Effort: ...')\n"
LATER = 'raise RuntimeError\nREASONING_EFFORT_PROMPTS: Dict[str, str] = {\n    "low": "",\n}\n'
BOS, ASKED = (
    "<｜begin▁of▁sentence｜>",
    "You are a helpful assistant.<｜User｜>What is 2+2?<｜Assistant｜>",
)
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is 2+2?"},
]
NOTHING = hashlib.sha256(b"").hexdigest()
MUCH = "f7a24f3b3050d4a83781e9b755b316aae2ec1d9dc87562541d90bcb04d7350f7"
MOST = "53fb31b8392ec5b4a926481943efc67636748f137c1a49d493a7af4d4fa55d2c"
EFFORTS = {
    FIRST: {None: NOTHING, "high": NOTHING, "max": MUCH},
    LATER: {None: NOTHING, "low": NOTHING, "high": MUCH, "max": MOST},
}


def folder_with(folder, source):
    write_model(folder, "deepseek-v4")
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding_dsv4.py").write_text(source, encoding="utf-8")
    return folder


@pytest.mark.parametrize("source", EFFORTS, ids=["first", "later"])
def test_an_effort_begins_the_prompt_as_the_encoder_of_the_checkpoint_has_it(tmp_path, source):
    chat = read_tokenizer(folder_with(tmp_path / "model", source)).chat
    for thinking, wanted in EFFORTS[source].items():
        text = chat.prompt(MESSAGES, thinking=thinking).text
        assert text.startswith(BOS) and text.endswith(f"{ASKED}<think>")
        effort = text.removeprefix(BOS).removesuffix(f"{ASKED}<think>")
        assert hashlib.sha256(effort.encode()).hexdigest() == wanted, thinking
    assert chat.prompt(MESSAGES, thinking="no_think").text == f"{BOS}{ASKED}</think>"
    named = [level for level in EFFORTS[source] if level]
    assert chat.thinking_levels == ("no_think", *named)


def test_efforts_of_the_later_encoder_are_as_vllm_takes_them(tmp_path):
    levels = read_tokenizer(folder_with(tmp_path / "model", LATER)).chat.thinking_levels
    taken = {"none": "no_think", "low": "low", "medium": "low", "high": "high", "xhigh": "high"}
    for effort, level in {**taken, "max": "max"}.items():
        assert level_of_effort(effort, levels) == level


def test_a_folder_without_an_encoder_is_read_as_the_first(tmp_path):
    chat = tokenizer_of(tmp_path / "model", "deepseek-v4").chat
    assert chat.thinking_levels == ("no_think", "high", "max")


def test_the_encoder_survives_a_checkpoint(tmp_path):
    tokenizer = read_tokenizer(folder_with(tmp_path / "model", LATER))
    again = write_model(tmp_path / "again", "deepseek-v4")
    tokenizer.save(again / "tokenizer.json")
    assert read_tokenizer(again).chat.thinking_levels == tokenizer.chat.thinking_levels
    assert (again / "encoding" / "encoding_dsv4.py").read_text(encoding="utf-8") == LATER


def test_an_answer_begins_behind_a_system_message_too(tmp_path):
    render = tokenizer_of(tmp_path / "model", "deepseek-v4").chat.renderer.render
    rules = {"role": "system", "content": "rules"}
    last = [rules, {"role": "user", "content": "question"}, {**rules, "content": "final rules"}]
    assert render(messages=last) == (
        f"{BOS}rules<｜User｜>questionfinal rules<｜Assistant｜><think>"
    )
    said = {"role": "assistant", "content": "answer", "reasoning_content": "reason"}
    assert render(messages=[rules, said]) == (
        f"{BOS}rules<｜Assistant｜><think>reason</think>answer<｜end▁of▁sentence｜>"
    )


@pytest.mark.parametrize("model", ["deepseek-v32", "deepseek-v4"])
def test_switches_of_other_servers_turn_the_thinking_on_and_off(tmp_path, model):
    chat = tokenizer_of(tmp_path / "model", model).chat
    for name in ("thinking", "enable_thinking"):
        for on, opens in ((True, "<think>"), (False, "</think>")):
            assert chat.prompt(MESSAGES, variables={name: on}).text == f"{BOS}{ASKED}{opens}"
    for wrong in ({"thinking": "yes"}, {"thinking": True, "enable_thinking": False}):
        with pytest.raises(ValueError, match="must be one bool"):
            chat.prompt(MESSAGES, variables=wrong)
    for level, on in (("high", False), ("no_think", True)):
        with pytest.raises(ValueError, match=f"thinking is {on} and its level {level}"):
            chat.prompt(MESSAGES, thinking=level, variables={"thinking": on})
    with pytest.raises(ValueError, match=r"reads no 'effort' .* reads enable_thinking, thinking"):
        chat.prompt(MESSAGES, variables={"effort": "max"})
