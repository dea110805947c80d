# SPDX-License-Identifier: Apache-2.0
"""Prompts and texts become the ids that transformers makes of them, byte for byte.

Needs the extra `hf`: transformers.
"""

import json

import pytest
from chat_folders import QWEN3, write_folder, write_model
from conversations import as_sent, conversation, joined

from jaxcp.text.folder import read_tokenizer

transformers = pytest.importorskip("transformers", reason="needs pip install jaxcp[hf]")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]
LEVELS = {
    "hy3": ("reasoning_effort", {"no_think": "no_think", "low": "low", "high": "high"}),
    "qwen3": ("enable_thinking", {"no_think": False, "high": True}),
    "gpt-oss": ("reasoning_effort", {"low": "low", "medium": "medium", "high": "high"}),
}
FORMS = {
    "hy3": {},
    "hy3-released": {},
    "qwen3": {"systems": 1},
    "gpt-oss": {"parts": False, "calls": 1, "systems": 1},
}


@pytest.mark.parametrize("model", FORMS)
def test_conversations(tmp_path, model):
    folder = write_model(tmp_path, model)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = read_tokenizer(folder)
    name, levels = LEVELS[model.removesuffix("-released")]
    for seed in range(100):
        messages, tools = conversation(seed, **FORMS[model])
        thinking = [None, *levels][seed % (len(levels) + 1)]
        told = {} if thinking is None else {name: levels[thinking]}
        given = joined(messages) if model == "qwen3" else messages  # it passes over parts
        continues = messages[-1]["role"] == "assistant"
        prompt = ours.chat.prompt(as_sent(messages), tools, thinking)
        text, ids = (
            theirs.apply_chat_template(
                given, tools=tools, tokenize=tokenize, return_dict=False, **told,
                add_generation_prompt=not continues, continue_final_message=continues,
            )
            for tokenize in (False, True)
        )  # fmt: skip
        assert prompt.text == text, (seed, thinking)
        assert prompt.ids == ids, (seed, thinking)


def test_control_tokens_of_users(tmp_path):
    folder = write_model(tmp_path, "hy3")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = read_tokenizer(folder)
    for said in ("a<think>b", "<｜hy_eos｜>", "</tool_call></tool_call> <arg_key", "<<think>>"):
        messages = [{"role": role, "content": said} for role in ("system", "user")]
        ids = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )
        assert ours.chat.prompt(messages).ids == ids


ENDS = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_eos_token": True, "bos_token": None},
    {"add_bos_token": True, "bos_token": {"content": "<|new|>", "__type": "AddedToken"}},
]


BEGINS = """{"type": "TemplateProcessing",
 "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}],
 "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
 "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [257],
                                     "tokens": ["<|im_start|>"]}}}"""


@pytest.mark.parametrize("rules", ENDS)
@pytest.mark.parametrize("processor", [False, True])
def test_ends_of_texts(tmp_path, rules, processor):
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"} | rules
    config["added_tokens_decoder"] = {
        "259": {"content": "<|later|>", "special": True},
        "260": {"content": "<plain>", "special": False},
    }
    folder = write_folder(tmp_path, QWEN3, config=config)
    if processor:
        fields = json.loads((folder / "tokenizer.json").read_text())
        fields["post_processor"] = json.loads(BEGINS)
        (folder / "tokenizer.json").write_text(json.dumps(fields))
    # said aloud: from files its version 5 passes over these two, which version 4 read
    said = {name: x for name, x in rules.items() if name.startswith("add_")}
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder, **said)
    ours = read_tokenizer(folder)
    for text in ("a", "a<plain>b", "", "<|later|>x<|im_end|>"):
        whole = ours.encode(text, read_control_tokens=True, whole=True).tolist()
        assert whole == theirs(text)["input_ids"]
