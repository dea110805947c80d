# SPDX-License-Identifier: Apache-2.0
"""Chat sessions of several models: calls of tools, dropped thoughts, meshes, guesses."""

import json
import re

import jax
import pytest
from said_answers import HY3_CALL, TOOLS, begun, ids_of, say, say_next, text_of
from tiny_chat import tokenizer_of

import jaxcp
from jaxcp.weights.placement import place

QWEN3_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
OSS_CALL = (
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
)
OSS_FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"
DROPPED = {
    "qwen3": ("high", "<think>\nhm\n</think>\n\nYes", "no_think", ""),
    "gpt-oss": ("low", f"<|channel|>analysis<|message|>hm{OSS_FINAL}Yes", "low", "<|channel|>"),
}


@pytest.mark.parametrize("kind", DROPPED)
def test_a_dropped_thought_costs_itself_and_the_answer_behind_it(kind, model, folder, monkeypatch):
    first, says, second, common = DROPPED[kind]
    engine = jaxcp.Engine(model, tokenizer_of(folder, kind), max_len=2048)
    session = engine.session(thinking=first)
    say_next(monkeypatch, says, None)
    assert say(session, "Hi", max_new_tokens=60) == "Yes"
    kept = session.stats.prefilled + len(ids_of(engine, common))
    session.thinking = second
    say(session, "And?", max_new_tokens=2)
    assert (session.stats.reused, session.stats.lost) == (
        kept, len(ids_of(engine, says.removeprefix(common))) - 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind, says",
    [("hy3", f"{HY3_CALL}"), ("qwen3", QWEN3_CALL), ("gpt-oss", OSS_CALL)],
)
def test_calls_are_answered_in_the_models_own_form(kind, says, model, folder, monkeypatch):
    engine = jaxcp.Engine(model, tokenizer_of(folder, kind), max_len=2048)
    level = {"hy3": "no_think", "gpt-oss": "low"}.get(kind)
    session = engine.session(tools=TOOLS, thinking=level)
    final = "<|channel|>final<|message|>Mild." if kind == "gpt-oss" else "Mild."
    say_next(monkeypatch, says, final)
    assert say(session, "Weather?", max_new_tokens=200) == ""
    (call,) = session.calls
    assert (call.name, call.arguments) == ("weather", {"city": "Paris"})
    with pytest.raises(ValueError, match="needed a list of 1 results"):
        session.reply(["a", "b"])
    with pytest.raises(ValueError, match="needed a list of 1 results"):
        session.reply("a")
    assert "".join(session.reply([{"t": 21, "sky": "é"}], max_new_tokens=60)) == "Mild."
    assert session.calls == []
    assert [m["role"] for m in session.messages] == ["user", "assistant", "tool", "assistant"]
    assert session.messages[2] == {
        "role": "tool", "tool_call_id": call.id, "content": '{"t": 21, "sky": "é"}',
    }  # fmt: skip
    rendered = engine.tokenizer.chat.prompt(session.messages[:3], TOOLS, level).text
    assert text_of(session).startswith(rendered)
    # gpt-oss's template writes the call in another order than the model does
    again = OSS_CALL.partition("<|start|>assistant")[2].removesuffix("<|call|>")
    assert session.stats.lost == (len(ids_of(engine, again)) - 1 if kind == "gpt-oss" else 0)
    assert session.undo() == "Weather?" and session.messages == []


@pytest.mark.slow
def test_a_mesh_says_the_same(model, engine, folder, mesh_of, monkeypatch):
    def talk(engine):
        say_next(monkeypatch, "hm, hm</think>Yes", None, "abcdefghij", None)
        session = begun(engine)
        said = [say(session, "Hi " * 60), say(session, "And?")]
        session.thinking = 5
        said.append(say(session, "So?"))
        return said, session.tokens, session.stats.reused, session.stats.lost

    alone = talk(engine)
    mesh_of(seq=2)
    sharded = jaxcp.Engine(place(model), tokenizer_of(folder, "hy3"), max_len=2048)
    assert talk(sharded) == alone
    assert len(jax.tree.leaves(sharded.runner.pool.layers)[0].sharding.device_set) == 2


@pytest.mark.slow
def test_guesses_and_a_budget(model, engine, folder):
    """Several tokens of a step may lie behind the end of the thinking."""

    def talk(engine):
        session = begun(engine, thinking=9)
        said = [say(session, "Hi", max_new_tokens=40), say(session, "And?", max_new_tokens=40)]
        return said, session.tokens, session.stats

    *alone, _ = talk(engine)
    guessing = jaxcp.Engine(model, engine.tokenizer, max_len=2048, drafts=3)
    *said, stats = talk(guessing)
    assert said == alone and stats.generated == 40 and stats.accepted > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
def test_what_is_sent_is_what_transformers_would_send(engine, folder, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs pip install jaxcp[hf]")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "hy3")
    say_next(monkeypatch, "hm</think>Yes", f"hm</think>So{HY3_CALL}", "</think>Mild")
    session = begun(engine, tools=TOOLS)
    for go_on in (
        lambda: session.send("Hi"), lambda: session.send("Weather?"), lambda: session.reply(["21"])
    ):  # fmt: skip
        list(go_on())
        messages = session.messages[:-1]
        for call in (call["function"] for m in messages for call in m.get("tool_calls", ())):
            call["arguments"] = json.loads(call["arguments"])  # as its template reads them
        ids = theirs.apply_chat_template(
            messages, tools=TOOLS, add_generation_prompt=True, return_dict=False,
            reasoning_effort="high",
        )  # fmt: skip
        assert session.tokens[: len(ids)] == ids


@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"json_schema": {"enum": [17]}}, "17"),
        ({"regex": "(ab/){2}"}, "ab/ab/"),
        ({"grammar": 'start: other "!"\nother: "a" | "b"'}, "[ab]!"),
    ],
    ids=["schema", "regex", "grammar"],
)
def test_a_grammar_waits_for_thinking_that_the_model_opens(
    kind, options, wanted, model, folder, monkeypatch
):
    """It may open it, or begin the answer; and a thought that is left to itself has no end."""
    engine = jaxcp.Engine(model, tokenizer_of(folder, kind), max_len=2048)
    opens, closes, level = {
        "qwen3": ("<think>", "hm</think>", "high"),
        "gpt-oss": ("<|channel|>analysis<|message|>", "hm<|end|>", "low"),
    }[kind]
    left = say_next(monkeypatch, opens, closes, None)
    session = engine.session(thinking=level)
    assert re.fullmatch(wanted, say(session, "Hi", max_new_tokens=80, **options))
    assert session.messages[-1]["reasoning"] == "hm" and not left
    say_next(monkeypatch)
    banned = ids_of(engine, {"qwen3": "<think>", "gpt-oss": "an"}[kind])
    answer = say(
        session, "So?", max_new_tokens=80, logit_bias=dict.fromkeys(banned, -100), **options
    )
    assert re.fullmatch(wanted, answer) and "reasoning" not in session.messages[-1]
    session.thinking = 6
    wanted_ids = ids_of(engine, {"qwen3": "<think>", "gpt-oss": "an"}[kind])
    answer = say(
        session, "And?", max_new_tokens=80, logit_bias=dict.fromkeys(wanted_ids, 100), **options
    )
    assert re.fullmatch(wanted, answer) and session.messages[-1]["reasoning"]
