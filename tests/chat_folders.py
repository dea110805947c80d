# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders with a tokenizer and a chat template, as publishers lay them out.

The vocabulary is the 256 bytes, so that texts are easy to read in ids, and the control tokens of
the model. Hy3's template and gpt-oss's are their publishers' own; Qwen3's is written after the
published one.
"""

import json
import re
from pathlib import Path

import tokenizers

from jaxcp.text.folder import read_tokenizer
from jaxcp.text.tokenizer import byte_level

FIXTURES = Path(__file__).parent / "fixtures" / "chat"
HY3 = (
    "<｜hy_begin▁of▁sentence｜>", "<｜hy_▁pad▁｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>",
    "<｜hy_eos｜>", "<think>", "</think>", "<tool_calls>", "</tool_calls>", "<tool_call>",
    "</tool_call>", "<tool_sep>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    "<tool_responses>", "</tool_responses>", "<tool_response>", "</tool_response>",
    "<｜reasoning_mode｜>",
)  # fmt: skip
QWEN3 = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN3_TAGS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
GPT_OSS = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>",
    "<|end|>", "<|message|>", "<|call|>",
)  # fmt: skip
DEEPSEEK = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
)  # fmt: skip
DEEPSEEK_TAGS = ("<think>", "</think>", "｜DSML｜")
SPELLED = ("hy3-spelled", "qwen3-spelled", "deepseek-v4-spelled")
"""The same where tags of thinking and calls are no tokens of the vocabulary."""
MODELS = ("hy3", "hy3-released", "qwen3", "gpt-oss", "deepseek-v32", "deepseek-v4")


def write_folder(folder, special, tags=(), *, template=None, config=None, model_type=None):
    """Write tokenizer.json with these tokens, `tags` among them as text that is not special."""
    backend = tokenizers.Tokenizer.from_str(byte_level().backend.to_str())
    backend.add_special_tokens(list(special))
    backend.add_tokens([tokenizers.AddedToken(x, special=False, normalized=False) for x in tags])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def write_model(folder, model):
    """Write the folder of one of `MODELS`, or of one of `SPELLED`."""
    if model in SPELLED:
        write_model(folder, model.removesuffix("-spelled"))
        fields = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        fields["added_tokens"] = [
            token
            for token in fields["added_tokens"]
            if not re.match("</?[at]|｜", token["content"])
        ]
        (folder / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
        return folder
    if model == "hy3":
        ends = {"bos_token": HY3[0], "eos_token": "<｜hy_eos｜>", "pad_token": HY3[1]}
        return write_folder(folder, HY3, template=text_of("hy3.jinja"), config=ends)
    if model == "hy3-released":
        ends = {"bos_token": released(HY3[0]), "eos_token": "<｜hy_eos:opensource｜>"}
        # as the release writes them: '<｜hy_eos{}｜>'.format(':opensource')
        tokens = r"'(<[^'\n]+?)(｜?>)'"
        template = re.sub(tokens, r"'\1{}\2'.format(':opensource')", text_of("hy3.jinja"))
        return write_folder(folder, map(released, HY3), template=template, config=ends)
    if model == "qwen3":
        ends = {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False}
        template = text_of("qwen3.jinja")
        return write_folder(folder, QWEN3, QWEN3_TAGS, template=template, config=ends)
    if model == "gpt-oss":
        ends = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>"}
        return write_folder(folder, GPT_OSS, template=text_of("gpt-oss.jinja"), config=ends)
    kind = model.replace("-", "_")
    ends = {"bos_token": DEEPSEEK[0], "eos_token": DEEPSEEK[1], "add_bos_token": True}
    return write_folder(folder, DEEPSEEK, DEEPSEEK_TAGS, config=ends, model_type=kind)


def tokenizer_of(folder, model):
    """Read the tokenizer of one of `MODELS`."""
    return read_tokenizer(write_model(folder, model))


def released(token):
    """A control token as Hy3's release has it."""
    return re.sub("(｜?>)$", r":opensource\1", token)


def text_of(name):
    """The text of a fixture."""
    return (FIXTURES / name).read_text(encoding="utf-8")
