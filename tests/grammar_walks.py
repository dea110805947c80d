# SPDX-License-Identifier: Apache-2.0
"""Calls of tools as templates write them, and ways through the grammars that allow them."""

import json

import numpy as np
from chat_folders import MODELS, tokenizer_of

from jaxcp.text.folder import read_tokenizer
from jaxcp.text.grammar import Grammars, checked_grammar

VOCAB = 300
USER = [{"role": "user", "content": "Go."}]
CODER = (
    "{%- for message in messages %}{{- '<|im_start|>' ~ message.role ~ '\\n' }}"
    "{{- message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- ('' if loop.first else '\\n') ~ '<tool_call>\\n<function=' ~ call.function.name }}"
    "{{- '>\\n' }}{%- for key, value in call.function.arguments.items() %}"
    "{{- '<parameter=' ~ key ~ '>\\n' ~ (value if value is string else value | tojson) }}"
    "{{- '\\n</parameter>\\n' }}"
    "{%- endfor %}{{- '</function>\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""After the published template of Qwen3-Coder, whose arguments stand between tags."""
NAMES = [*MODELS, "qwen3-coder", "qwen3-spelled", "hy3-spelled", "deepseek-v4-spelled"]


def tokenizers_in(folder):
    """Give a function that makes the tokenizer of each of `NAMES` once."""
    read = {}

    def get(name):
        if name not in read:
            if name == "qwen3-coder":
                tokenizer_of(folder / name, "qwen3")
                (folder / name / "chat_template.jinja").write_text(CODER)
                read[name] = read_tokenizer(folder / name)
            else:
                read[name] = tokenizer_of(folder / name, name)
        return read[name]

    return get


def calling(*calls):
    return {
        "role": "assistant", "content": "", "reasoning_content": "hm",
        "tool_calls": [
            {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ],
    }  # fmt: skip


def written_by_the_template(tokenizer, tools, *calls):
    """Give what the template writes of an assistant's message with these calls, up to its end."""
    chat = tokenizer.chat
    results = [
        {"role": "tool", "tool_call_id": f"c{i}", "content": "done"} for i in range(len(calls))
    ]
    text = chat.prompt([*USER, calling(*calls), *results], tools=tools).text
    begin = chat.prompt(USER, tools=tools).text
    same = next(
        i for i, (a, b) in enumerate(zip(text + "\0", begin + "\1", strict=False)) if a != b
    )
    return text[same:]


def allowed(constraint):
    bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits[:VOCAB])


def accepted(tokenizer, grammar, text):
    """The longest beginning of a text, in ids, that a grammar lets through."""
    grammars = Grammars(tokenizer, VOCAB)
    constraint = grammars.constraint(
        checked_grammar("grammar", grammar), tokenizer.chat.stop_tokens
    )
    taken = []
    for token in tokenizer.encode(text, read_control_tokens=True).tolist():
        ends = constraint.complete or token in tokenizer.chat.stop_tokens
        if ends or token not in allowed(constraint):
            break
        constraint.take(token)
        taken.append(token)
    return taken, constraint


def read(tokenizer, prompt, grammar, ids):
    parser = prompt.parser(grammar)
    parser.push(ids)
    parser.finish()
    return parser.message(), parser.malformed


def arguments_of(message):
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls", ())
    ]


START = {
    "hy3": "<tool_calls>", "hy3-released": "<tool_calls:opensource>", "hy3-spelled": "<tool_calls>",
    "qwen3": "<tool_call>", "qwen3-spelled": "<tool_call>", "qwen3-coder": "<tool_call>",
    "gpt-oss": " to=functions", "deepseek-v32": "\n\n<｜DSML｜", "deepseek-v4": "\n\n<｜DSML｜",
    "deepseek-v4-spelled": "\n\n<｜DSML｜",
}  # fmt: skip


def closed(tokenizer):
    levels = tokenizer.chat.thinking_levels
    return "no_think" if "no_think" in levels else None


ENDS = {
    "qwen3-coder": "\n</parameter>", "hy3-spelled": "</arg_value>", "deepseek-v32": "</｜DSML｜",
    "deepseek-v4": "</｜DSML｜", "deepseek-v4-spelled": "</｜DSML｜parameter>",
}  # fmt: skip
"""The ends of texts that chance alone does not find."""


def walk(constraint, ends, never, rng, end):
    """Take tokens at random, those that may end something more often than others."""
    taken, wanted = [], []
    while not constraint.complete:
        may = allowed(constraint)
        if np.isin(ends, may).any() and rng.random() < 0.7:
            break
        may = np.setdiff1d(may, [*ends, *never])
        wanted = wanted or (list(end) if rng.random() < 0.1 else [])
        better = may[(may > 255) | np.isin(may, [ord(x) for x in '}"<>/\n]'])]
        if wanted and wanted[0] in may:
            token = wanted.pop(0)
        else:
            token, wanted = (
                int(rng.choice(better if len(better) and rng.random() < 0.5 else may)),
                [],
            )
        constraint.take(token)
        taken.append(token)
        assert len(taken) < 2000
    return taken
