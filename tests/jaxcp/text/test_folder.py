# SPDX-License-Identifier: Apache-2.0
"""All that lies beside tokenizer.json and changes ids is read, and what is wrong is named."""

import json
import shutil

import pytest
import tokenizers
from chat_folders import (
    DEEPSEEK,
    DEEPSEEK_TAGS,
    GPT_OSS,
    HY3,
    QWEN3,
    QWEN3_TAGS,
    text_of,
    write_folder,
    write_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import FIXTURES
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

import jaxcp
from jaxcp.text.folder import read_tokenizer
from jaxcp.text.generation import Defaults

USER = {"role": "user", "content": "Hi"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def config_of(folder, **fields):
    (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return read_tokenizer(folder)


def test_a_folder_without_a_tokenizer(tmp_path):
    assert read_tokenizer(tmp_path) is None


def test_templates_by_name(tmp_path):
    write_folder(tmp_path, QWEN3)
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    for listed in (named, {x["name"]: x["template"] for x in named}):
        chat = config_of(tmp_path, chat_template=listed).chat
        assert chat.prompt([USER]).text == "plain"
        assert chat.prompt([USER], TOOLS).text == "tools"
    chat = config_of(tmp_path, chat_template="{{ bos_token }}one", bos_token="<|im_start|>").chat
    assert chat.prompt([USER]).text == "<|im_start|>one" == chat.prompt([USER], TOOLS).text


def test_the_file_comes_before_the_field(tmp_path):
    write_folder(tmp_path, QWEN3, template="file")
    assert config_of(tmp_path, chat_template="field").chat.prompt([USER]).text == "file"


def test_the_template_of_a_processor(tmp_path):
    write_folder(tmp_path, QWEN3)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "old"}')
    assert read_tokenizer(tmp_path).chat.prompt([USER]).text == "old"


def test_the_published_configuration_of_gpt_oss(tmp_path):
    folder = write_folder(tmp_path, GPT_OSS, template=text_of("gpt-oss.jinja"))
    published = json.loads(text_of("gpt-oss.tokenizer_config.json"))
    with pytest.raises(ValueError, match=r"'<\|reserved_200000\|>' as token 200000.* is 265"):
        config_of(folder, **published)  # this vocabulary is a small one
    published["added_tokens_decoder"] = {"265": published["added_tokens_decoder"]["200000"]}
    (folder / "generation_config.json").write_text(text_of("gpt-oss.generation_config.json"))
    tokenizer = config_of(folder, **published)
    assert tokenizer.encode("<|reserved_200000|>", read_control_tokens=True).tolist() == [265]
    assert tokenizer.decode([265, 97]) == "a"
    assert tokenizer.defaults == Defaults(temperature=1.0)
    assert (tokenizer.begin, tokenizer.end) == ((), ())


def test_tokens_that_are_added_later(tmp_path):
    write_folder(tmp_path, QWEN3)
    (tmp_path / "added_tokens.json").write_text('{"<b>": 260, "<a>": 259, "<|im_end|>": 258}')
    tokenizer = config_of(tmp_path, eos_token={"content": "<|new|>"}, add_eos_token=True)
    assert tokenizer.encode("<a><b>x", whole=True).tolist() == [259, 260, 120, 261]


def test_ends_that_an_older_file_names(tmp_path):
    write_folder(tmp_path, QWEN3, template="{{ eos_token }}")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    chat = config_of(tmp_path, bos_token=None).chat
    assert chat.prompt([USER]).text == "<|im_end|>" and chat.stop_tokens == (258,)


WRONG = {
    "chat_template.jinja": (b"{% if %}", "needed a chat template of jinja2; .*Expected"),
    "chat_template.jinja ": (b"\xff", "chat_template.jinja is none at byte 0"),
    "tokenizer_config.json": (b"[]", "needed a JSON object"),
    "generation_config.json": (b"{", "needed JSON; got .*generation_config.json"),
    "added_tokens.json": (b'{"<x>": 999}', "'<x>' as token 999"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(tmp_path, name):
    data, reason = WRONG[name]
    write_folder(tmp_path, QWEN3)
    (tmp_path / name.strip()).write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        read_tokenizer(tmp_path)


TOKENS = st.sampled_from(["<|im_end|>", "<new>", "", "256", "999", "default", "{{ x }}"])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 300), TOKENS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TOKENS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = st.sampled_from(
    ["added_tokens_decoder", "chat_template", "bos_token", "eos_token", "add_bos_token", "x"]
)


@settings(max_examples=50, deadline=None)
@given(fields=st.dictionaries(FIELDS, JSON, max_size=4), added=st.dictionaries(TOKENS, JSON))
def test_any_fields_are_read_or_refused(tmp_path_factory, fields, added):
    folder = write_folder(tmp_path_factory.getbasetemp() / "any", QWEN3, config=fields)
    (folder / "added_tokens.json").write_text(json.dumps(added))
    try:
        tokenizer = read_tokenizer(folder)
    except ValueError as error:
        assert str(folder) in str(error)
        return
    assert tokenizer.encode("a").tolist() == [97]
    assert tokenizer.encode("a", whole=True).tolist()[len(tokenizer.begin)] == 97


HOSTILE = {
    "{{ messages.__class__.__mro__ }}": "unsafe|not take",
    "{{ messages.append(1) }}": "unsafe|not take",
    "{% for i in range(999999999) %}x{% endfor %}": "too big|not take",
    "{{ 1 / 0 }}": "zero",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}": "no '__init__'",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_is_not_trusted(tmp_path, template):
    chat = read_tokenizer(write_folder(tmp_path, QWEN3, template=template)).chat
    with pytest.raises(ValueError, match=HOSTILE[template]):
        chat.prompt([USER])


def test_the_tag_generation_and_loop_controls(tmp_path):
    template = (
        "{% for m in messages %}\n    {% generation %}\n{{ m.content }}{% endgeneration %}\n"
        "{% if loop.index > 1 %}{% break %}{% endif %}\n{% endfor %}"
    )
    chat = read_tokenizer(write_folder(tmp_path, QWEN3, template=template)).chat
    assert chat.prompt([USER] * 4).text == "HiHi"


def test_a_model_that_does_not_think_may_speak_of_it(tmp_path):
    said = "Write <think> first, then </think>."
    for tokens, content in ((QWEN3, said), ((*QWEN3, *QWEN3_TAGS), "Write ")):
        chat = read_tokenizer(write_folder(tmp_path, tokens, template="x")).chat
        parser = chat.prompt([USER]).parser()
        parser.push(chat.tokenizer.encode(said, read_control_tokens=True).tolist())
        parser.finish()
        assert parser.message()["content"].startswith(content)
        assert ("reasoning" in parser.message()) == (content != said)


CODER = "{% if 0 %}<function=f>\n<parameter=x>\n</tool_call>{% endif %}{{ messages[0].content }}"


def test_calls_of_qwen3_coder(tmp_path):
    chat = read_tokenizer(write_folder(tmp_path, QWEN3, QWEN3_TAGS, template=CODER)).chat
    answer = (
        "So\n<tool_call>\n<function=f>\n<parameter=a>\nline\n\n</parameter>\n<parameter=b>\n5\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=f>\n</function>\n"
        "</tool_call><|im_end|>"
    )
    properties = {"properties": {"b": {"type": ["integer", "null"]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": properties}}]
    parser = chat.prompt([USER], tools).parser()
    parser.push(chat.tokenizer.encode(answer, read_control_tokens=True).tolist())
    parser.finish()
    message = parser.message()
    assert message["content"] == "So" and not parser.malformed
    calls = [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]]
    assert calls == [{"a": "line\n", "b": 5}, {}]


@pytest.mark.parametrize("block", ["tool_calls", "function_calls"])
def test_a_template_for_deepseek(tmp_path, block):
    source = "{% set dsml = '｜DSML｜' %}{{ '<' ~ dsml ~ '" + block + ">' ~ messages[0].content }}"
    folder = write_folder(tmp_path, DEEPSEEK, DEEPSEEK_TAGS, template=source)
    chat = read_tokenizer(folder).chat
    parser = chat.prompt([USER], TOOLS).parser()
    call = f'<｜DSML｜{block}>\n<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n</｜DSML｜{block}>'
    parser.push(chat.tokenizer.encode(f"So\n\n{call}", read_control_tokens=True).tolist())
    parser.finish()
    (made,) = parser.message()["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": "{}"} and not parser.malformed


def test_conversations_survive_a_checkpoint(tmp_path):
    shutil.copytree(FIXTURES / "qwen3-moe-tiny", tmp_path / "in")
    model, tokenizer = jaxcp.load(write_model(tmp_path / "in", "qwen3"))
    jaxcp.save(model, tmp_path / "out", tokenizer)
    again = jaxcp.load(tmp_path / "out")[1]
    for chat in (tokenizer.chat, again.chat):
        assert chat.prompt([USER]).text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


ADVICE = {
    "{}": Defaults(),
    '{"temperature": 0.9, "top_p": 1.0, "top_k": 20}': Defaults(
        temperature=0.9, top_p=1.0, top_k=20
    ),
    '{"do_sample": false, "temperature": 0.9}': Defaults(temperature=0.0),
    '{"do_sample": true}': Defaults(temperature=1.0),
    '{"temperature": -1, "top_p": "x", "top_k": 0}': Defaults(),
    '{"temperature": true, "top_p": 2}': Defaults(),
}


@pytest.mark.parametrize("said", ADVICE)
def test_defaults_of_generation(tmp_path, said):
    write_folder(tmp_path, HY3)
    (tmp_path / "generation_config.json").write_text(said)
    assert read_tokenizer(tmp_path).defaults == ADVICE[said]


def test_a_tokenizer_without_common_letters_has_its_begin(tmp_path):
    """Any token that is no special one shows what stands around a text."""
    backend = tokenizers.Tokenizer(WordLevel({"<s>": 0, "zebra": 1}))
    backend.add_special_tokens(["<s>"])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    read = read_tokenizer(tmp_path)
    assert (tuple(read.begin), tuple(read.end)) == ((0,), ())
