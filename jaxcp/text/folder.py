# SPDX-License-Identifier: Apache-2.0
"""Reads the tokenizer of a checkpoint folder: tokenizer.json and what beside it changes ids.

tokenizer_config.json says which tokens begin and end a text, and may add tokens; a chat template
lies in chat_template.jinja, or in a field of tokenizer_config.json. Models of DeepSeek that have
none are known by the `model_type` of config.json, and by the encoder that lies beside V4.
"""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from jaxcp.input_files import JSON_BYTES, read_bytes, read_json
from jaxcp.text import deepseek
from jaxcp.text.chat import Chat
from jaxcp.text.control import plain_ids
from jaxcp.text.generation import CONFIG, read_defaults
from jaxcp.text.template import Template
from jaxcp.text.tokenizer import Tokenizer
from jaxcp.text.tools.formats import dsml, format_of

TOKENIZER, BESIDE = "tokenizer.json", "tokenizer_config.json"
ADDED, NAMED = "added_tokens.json", "special_tokens_map.json"
JINJA, LEGACY = "chat_template.jinja", "chat_template.json"
NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
"""Fields of tokenizer_config.json that name one token each; templates may write them."""
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")
"""End a turn where a template writes them, whatever the end of a text is."""


def read_tokenizer(folder: str | os.PathLike) -> Tokenizer | None:
    """Read the tokenizer of a checkpoint folder; None where it has no tokenizer.json.

    `tokenizer.chat` is None where there is neither a template nor an encoder: such a model takes
    plain text.

    Raises:
      ValueError: a file is not what it should be; the message names it.
    """
    folder = Path(folder)
    if not (folder / TOKENIZER).exists():
        return None
    tokenizer = Tokenizer.from_file(folder / TOKENIZER)
    fields = _json(folder / BESIDE)
    older = _json(folder / NAMED)
    given = (_content(fields.get(name, older.get(name))) for name in NAMES)
    names = {name: text for name, text in zip(NAMES, given, strict=True) if text}
    added = _json(folder / ADDED)
    try:
        _add_tokens(tokenizer.backend, fields, added, names)
        tokenizer.chat = _chat(tokenizer, folder, _templates(folder, fields), names)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    tokenizer.begin, tokenizer.end = _around(tokenizer.backend, fields, names)
    tokenizer.defaults = read_defaults(folder)
    tokenizer.beside = {
        name: read_bytes(folder / name, JSON_BYTES)
        for name in (BESIDE, NAMED, JINJA, LEGACY, deepseek.V4_ENCODER)
        if (folder / name).exists()
    }
    return tokenizer


def _chat(
    tokenizer: Tokenizer, folder: Path, sources: Mapping[str, str], names: Mapping[str, str]
) -> Chat | None:
    ends = [names["eos_token"]] if "eos_token" in names else []
    if not sources:
        kind = _json(folder / CONFIG).get("model_type")
        file = folder / deepseek.V4_ENCODER
        encoder = deepseek.encoder_of(str(kind), _utf8(file) if file.exists() else "")
        if encoder is None:
            return None
        return Chat(tokenizer, encoder, dsml(encoder.block), names=names, ends=[deepseek.EOS])
    default = Template(sources.get("default") or next(iter(sources.values())))
    with_tools = Template(sources["tool_use"]) if "tool_use" in sources else default
    written = default.literals + with_tools.literals
    ends += [token for token in TURN_ENDS if token in written]
    added = tokenizer.backend.get_added_tokens_decoder().values()
    tags = format_of(written, [token.content for token in added])
    return Chat(tokenizer, default, tags, with_tools=with_tools, names=names, ends=ends)


def _json(file: Path) -> dict[str, Any]:
    # a model_max_length of 10^30 is what tokenizers without a limit have
    return read_json(file, large_integers=True) if file.exists() else {}


def _content(token: Any) -> str:
    """A token of tokenizer_config.json: text, or an object whose `content` it is."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else ""


def _add_tokens(
    backend: tokenizers.Tokenizer,
    fields: Mapping[str, Any],
    added: Mapping[str, Any],
    names: Mapping[str, str],
) -> None:
    """Add the tokens that tokenizer.json lacks, in the order of their ids.

    Raises:
      ValueError: a token would have another id than the file says.
    """
    listed = fields.get("added_tokens_decoder") or {}
    wanted = dict(listed) if isinstance(listed, dict) else {"": listed}
    wanted |= {str(i): {"content": x} for x, i in added.items() if str(i) not in wanted}
    for i, token in wanted.items():
        if not (i.isascii() and i.isdecimal() and len(i) < 10 and isinstance(token, dict)):
            raise ValueError(
                f"needed tokens by their ids in {BESIDE} and {ADDED}; one is {token!r:.100} with "
                f"the id {i!r:.100}. Copy both files again"
            )
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted(wanted.items(), key=lambda item: int(item[0])):
        content = _content(token)
        if not content or content in there:
            continue
        flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        special = bool(token.get("special")) or content in names.values()
        flags["normalized"] = bool(token.get("normalized", not special))
        backend.add_tokens([tokenizers.AddedToken(content, special=special, **flags)])
        if backend.token_to_id(content) != int(i):
            raise ValueError(
                f"needed {content!r:.100} as token {int(i)}, as {BESIDE} says; by {TOKENIZER} it "
                f"is {backend.token_to_id(content)}. Copy both files again"
            )
    missing = [x for x in dict.fromkeys(names.values()) if backend.token_to_id(x) is None]
    backend.add_special_tokens([tokenizers.AddedToken(x, special=True) for x in missing])


def _around(
    backend: tokenizers.Tokenizer, fields: Mapping[str, Any], names: Mapping[str, str]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the ids before and after a text: as `add_bos_token` and `add_eos_token` say, or as the
    post-processor of tokenizer.json puts them."""
    if "add_bos_token" in fields or "add_eos_token" in fields or backend.post_processor is None:
        return _one(backend, fields, names, "bos"), _one(backend, fields, names, "eos")
    around = backend.encode("", add_special_tokens=True).ids
    for text in ("a", *itertools.islice(backend.get_vocab(), 100)) if around else ():
        try:
            plain = plain_ids(backend, text)
        except ValueError:  # no token for it
            continue
        full = backend.encode(text, add_special_tokens=True).ids
        at = full.index(plain[0]) if plain and not {*plain} & {*around} else -1
        if at >= 0:
            return tuple(full[:at]), tuple(full[at + len(plain) :])
    return (), ()


def _one(
    backend: tokenizers.Tokenizer, fields: Mapping[str, Any], names: Mapping[str, str], end: str
) -> tuple[int, ...]:
    token = backend.token_to_id(names.get(f"{end}_token", ""))
    return (token,) if fields.get(f"add_{end}_token") is True and token is not None else ()


def _templates(folder: Path, fields: Mapping[str, Any]) -> dict[str, str]:
    """Find the chat templates by their names; the file comes before the field."""
    if (folder / JINJA).exists():
        return {"default": _utf8(folder / JINJA)}
    given = fields.get("chat_template", _json(folder / LEGACY).get("chat_template"))
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        given = {x.get("name"): x.get("template") for x in given if isinstance(x, dict)}
    given = given if isinstance(given, dict) else {}
    return {k: x for k, x in given.items() if isinstance(k, str) and isinstance(x, str)}


def _utf8(file: Path) -> str:
    try:
        return read_bytes(file, JSON_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"needed UTF-8 text; {file} is none at byte {error.start}") from error
