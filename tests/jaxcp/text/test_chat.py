# SPDX-License-Identifier: Apache-2.0
"""A prompt is what the template writes; what users write in it never is a control token."""

import pytest
from chat_folders import HY3, MODELS, tokenizer_of, write_folder, write_model
from conversations import conversation
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcp.text.folder import read_tokenizer

USER = {"role": "user", "content": "Hi"}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    return {model: tokenizer_of(folder / model, model) for model in MODELS}


PROMPTS = {
    ("hy3", None): "<｜hy_begin▁of▁sentence｜>S<｜reasoning_mode｜>reasoning_effort:no_think"
    "<｜hy_User｜>Hi<｜hy_Assistant｜><think></think>",
    ("hy3", "low"): "<｜hy_begin▁of▁sentence｜>S<｜reasoning_mode｜>reasoning_effort:low"
    "<｜hy_User｜>Hi<｜hy_Assistant｜><think>",
    ("hy3-released", "high"): "<｜hy_begin▁of▁sentence:opensource｜>S"
    "<｜reasoning_mode:opensource｜>reasoning_effort:high<｜hy_User:opensource｜>Hi"
    "<｜hy_Assistant:opensource｜><think:opensource>",
    ("qwen3", None): "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n",
    ("qwen3", "no_think"): "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ("deepseek-v32", None): "<｜begin▁of▁sentence｜>S<｜User｜>Hi<｜Assistant｜></think>",
    ("deepseek-v32", "high"): "<｜begin▁of▁sentence｜>S<｜User｜>Hi<｜Assistant｜><think>",
    ("deepseek-v4", None): "<｜begin▁of▁sentence｜>S<｜User｜>Hi<｜Assistant｜><think>",
}  # fmt: skip


@pytest.mark.parametrize(("model", "thinking"), PROMPTS)
def test_a_prompt_is_what_the_template_writes(tokenizers, model, thinking):
    tokenizer = tokenizers[model]
    system = {"role": "system", "content": "S"}
    prompt = tokenizer.chat.prompt([system, USER], thinking=thinking)
    assert prompt.text == PROMPTS[model, thinking]
    assert prompt.ids == tokenizer.encode(prompt.text, read_control_tokens=True).tolist()
    opened = prompt.text.endswith(("<think>", "<think:opensource>"))
    assert prompt.parser().reasoning == opened


LEVELS = {
    "hy3": ("no_think", "low", "high"),
    "qwen3": ("no_think", "high"),
    "gpt-oss": ("low", "medium", "high"),
    "deepseek-v32": ("no_think", "high"),
    "deepseek-v4": ("no_think", "high", "max"),
}
STOPS = {
    "hy3": ["<｜hy_eos｜>"],
    "qwen3": ["<|im_end|>"],
    "gpt-oss": ["<|return|>", "<|call|>"],
    "deepseek-v4": ["<｜end▁of▁sentence｜>"],
}


@pytest.mark.parametrize("model", LEVELS)
def test_levels_are_those_of_the_checkpoint(tokenizers, model):
    chat = tokenizers[model].chat
    assert chat.thinking_levels == LEVELS[model]
    for wrong in ("loud", True, -1, 0.5):
        with pytest.raises(ValueError, match="thinking must be one of"):
            chat.prompt([USER], thinking=wrong)


@pytest.mark.parametrize("model", STOPS)
def test_stop_tokens_end_a_turn(tokenizers, model):
    tokenizer = tokenizers[model]
    stops = [tokenizer.backend.token_to_id(token) for token in STOPS[model]]
    assert list(tokenizer.chat.prompt([USER]).stop_tokens) == stops


def test_a_model_without_a_template_takes_plain_text(tmp_path):
    folder = write_folder(tmp_path, HY3, config={"bos_token": HY3[0], "add_bos_token": True})
    tokenizer = read_tokenizer(folder)
    assert tokenizer.chat is None
    assert tokenizer.encode("a", whole=True).tolist() == [256, 97]
    assert tokenizer.encode("a").tolist() == [97]


ANYTHING = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.sampled_from(["<think>", "</think>", "<|im_end|>", "<|im_", "end|>", "<", "\ue000"]),
    ),
    max_size=6,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(said=st.lists(ANYTHING, min_size=1, max_size=3), model=st.sampled_from(["hy3", "qwen3"]))
def test_what_users_write_is_text(tokenizers, said, model):
    tokenizer = tokenizers[model]
    plain = tokenizer.chat.prompt([{"role": "user", "content": "x" * 3}] * len(said))
    prompt = tokenizer.chat.prompt([{"role": "user", "content": text} for text in said])
    control = [[i for i in ids if i >= 256] for ids in (prompt.ids, plain.ids)]
    assert control[0] == control[1], "as many control tokens as with any other text"
    text = tokenizer.backend.decode(prompt.ids, skip_special_tokens=False)
    assert text == prompt.text and all(x in text for x in said)


def test_control_tokens_in_messages_by_name(tokenizers):
    tokenizer = tokenizers["qwen3"]
    message = {"role": "user", "content": "a<|im_end|>b"}
    text, control = (tokenizer.chat.prompt([message], read_control_tokens=x) for x in (False, True))
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert text.text == control.text
    assert text.ids.count(end) == 1 and control.ids.count(end) == 2


def test_templates_that_escape_make_no_control_token(tmp_path):
    template = "<think>{{ messages[0].content | tojson(ensure_ascii=True) }}</think>"
    tokenizer = read_tokenizer(write_folder(tmp_path, HY3, template=template))
    prompt = tokenizer.chat.prompt([{"role": "user", "content": r"é</think> \ue000"}])
    assert prompt.text == r'<think>"\u00e9</think> \\ue000"</think>'
    assert [i for i in prompt.ids if i >= 256] == [261, 262]


def test_parts_of_a_message_make_no_control_token(tokenizers):
    tokenizer = tokenizers["hy3"]
    parts = [{"type": "text", "text": x} for x in ("<｜hy_", "eos", "｜>", "</thi", "nk>")]
    prompt = tokenizer.chat.prompt([{"role": "user", "content": parts}])
    assert "<｜hy_eos｜></think>" in prompt.text
    assert tokenizer.backend.token_to_id("<｜hy_eos｜>") not in prompt.ids
    # a system prompt is joined by the template itself
    system = [{"role": "system", "content": x} for x in ("<｜hy_", "eos｜>")]
    prompt = tokenizer.chat.prompt([*system, USER])
    assert "<｜hy_eos｜>" in prompt.text
    assert tokenizer.backend.token_to_id("<｜hy_eos｜>") not in prompt.ids


@pytest.mark.parametrize("model", MODELS)
def test_an_open_message_goes_on(tokenizers, model):
    tokenizer = tokenizers[model]
    prompt = tokenizer.chat.prompt([USER, {"role": "assistant", "content": "So it"}])
    assert prompt.text.endswith("So it") and not prompt.parser().reasoning
    parser = prompt.parser()
    parser.push(tokenizer.encode(" goes"))
    parser.finish()
    assert parser.message() == {"role": "assistant", "content": " goes"}


WRONG = {
    "at least one": [],
    "must be an object": ["hi"],
    "role must be one of": [{"role": "robot", "content": "x"}],
    "has no content": [{"role": "user"}],
    r"content\[0\] must be of type text": [{"role": "user", "content": [{"type": "image_url"}]}],
    "content must be a string": [{"role": "user", "content": 5}],
    "arguments must be JSON": [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    ],
    "must have a function with a name": [{"role": "assistant", "tool_calls": [{"id": "1"}]}],
    "data of JSON": [{"role": "user", "content": "x", "extra": object()}],
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_messages_are_named(tokenizers, reason):
    with pytest.raises(ValueError, match=reason):
        tokenizers["hy3"].chat.prompt(WRONG[reason])


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 50), model=st.sampled_from(MODELS), value=JSON, data=st.data())
def test_any_messages_are_rendered_or_refused(tokenizers, seed, model, value, data):
    messages, tools = conversation(seed, systems=1)
    within = [messages, tools or []]
    while True:  # put the value anywhere
        keys = list(within) if isinstance(within, dict) else range(len(within))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(within[key], dict | list) or not within[key] or data.draw(st.booleans()):
            break
        within = within[key]
    kept = within[key]
    within[key] = value
    try:
        prompt = tokenizers[model].chat.prompt(messages, tools)
        assert prompt.ids and isinstance(prompt.text, str)
    except ValueError as error:
        assert str(error)
    finally:
        within[key] = kept  # tools are of all tests


def test_wrong_tools_are_named(tokenizers):
    chat = tokenizers["hy3"].chat
    with pytest.raises(ValueError, match="a function with a name"):
        chat.prompt([USER], tools=[{"name": "f"}])
    with pytest.raises(ValueError, match="a name of its own"):
        chat.prompt([USER], tools=TOOLS * 2)


def test_a_template_refuses_with_its_own_words(tmp_path):
    template = "{{ raise_exception('no ' ~ messages[0].role ~ 's here') }}"
    chat = read_tokenizer(write_folder(tmp_path, HY3, template=template)).chat
    with pytest.raises(ValueError, match="no users here"):
        chat.prompt([USER])


def test_files_beside_the_tokenizer_survive(tmp_path):
    folder = write_model(tmp_path / "a", "hy3")
    tokenizer = read_tokenizer(folder)
    (tmp_path / "b").mkdir()
    tokenizer.save(tmp_path / "b" / "tokenizer.json")
    again = read_tokenizer(tmp_path / "b")
    assert again.chat.prompt([USER]).ids == tokenizer.chat.prompt([USER]).ids
