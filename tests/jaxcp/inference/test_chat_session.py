# SPDX-License-Identifier: Apache-2.0
"""Conversations by a chat template: what is sent, what is said, what is kept and what it costs."""

import json

import pytest
from said_answers import HY3_CALL, TOOLS, begun, ids_of, say, say_next, text_of
from talkative import talkative_gpt

import jaxcp
from jaxcp.inference import ChatSession, Session
from jaxcp.inference.runner import Runner
from jaxcp.text.tokenizer import byte_level

BEGIN = "<｜hy_begin▁of▁sentence｜>Be kind.<｜reasoning_mode｜>reasoning_effort:"
USER, ANSWER, END = "<｜hy_User｜>", "<｜hy_Assistant｜>", "<｜hy_eos｜>"


def test_thoughts_leave_the_history_as_the_template_rules(engine, monkeypatch):
    say_next(monkeypatch, "hm, hm</think>Yes", "</think>No")
    session = begun(engine)
    assert isinstance(session, ChatSession) and say(session, "Hi") == "Yes"
    first = f"{BEGIN}high{USER}Hi{ANSWER}<think>"
    assert text_of(session) == f"{first}hm, hm</think>Yes{END}"
    kept = len(ids_of(engine, first))
    assert (session.stats.prefilled, session.stats.reused, session.stats.lost) == (kept, 0, 0)
    assert (session.stats.generated, session.stats.turns) == (6 + 1 + 3, 1)
    assert say(session, "And?") == "No"
    second = f"{first}</think>Yes{END}{USER}And?{ANSWER}<think>"
    assert text_of(session) == f"{second}</think>No{END}"
    assert session.stats.reused == kept and session.stats.prefilled == len(
        ids_of(engine, second.removeprefix(first))
    )
    assert session.stats.lost == len("hm, hm") + 1 + len("Ye")  # the last was not computed yet
    assert session.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes", "reasoning": "hm, hm"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No"},
    ]


def test_what_is_found_is_what_is_computed_anew(engine, monkeypatch):
    say_next(monkeypatch, "hm</think>Yes", None)
    session = begun(engine)
    say(session, "Hi")
    say(session, "And?")
    tokens, generated = session.tokens, session.stats.generated
    engine.scheduler.tree.clear()
    (anew,) = engine.generate(
        [tokens[: len(tokens) - generated]], jaxcp.Sampling(max_new_tokens=generated)
    )
    assert session.stats.reused > 0 and anew.tokens == tokens[-generated:]


def test_thinking_and_answer_are_two_streams(engine, monkeypatch):
    say_next(monkeypatch, "hm</think>Yes", "hm</think>Yes")
    pieces = list(begun(engine).send("Hi", reasoning=True))
    assert all(isinstance(piece, str) for piece in pieces)
    assert [(p.kind, str(p)) for p in pieces] == [
        ("reasoning", "h"), ("reasoning", "m"), ("text", "Y"), ("text", "e"), ("text", "s"),
    ]  # fmt: skip
    assert [p.kind for p in begun(engine).send("Hi")] == ["text"] * 3


def test_a_changed_effort_costs_what_the_template_puts_before_all_else(engine, monkeypatch):
    say_next(monkeypatch, "Yes", "hm</think>No", "</think>Well")
    session = begun(engine, thinking="no_think")
    say(session, "Hi")
    before, session.thinking = session.stats.tokens, "high"
    say(session, "And?")
    same = len(ids_of(engine, BEGIN))
    assert (session.stats.reused, session.stats.lost) == (same, before - same)
    session.system = "Be brief."
    say(session, "So?")
    assert session.stats.reused == len(ids_of(engine, BEGIN.partition("kind")[0]))
    assert session.messages[0]["content"] == "Be brief."


def test_a_budget_closes_the_thinking_and_the_answer_follows(engine, monkeypatch):
    left = say_next(monkeypatch, "abcdefghij", "Yes", None)
    session = begun(engine, thinking=5)
    assert say(session, "Hi") == "Yes" and left == [None]
    assert session.messages[-1] == {"role": "assistant", "content": "Yes", "reasoning": "abcde"}
    prompt = f"{BEGIN}high{USER}Hi{ANSWER}<think>"
    assert text_of(session) == f"{prompt}abcde</think>Yes{END}"
    assert session.stats.generated == 5 + 3 and session.stats.turns == 1
    # the marker, and the last thought or two, which the first request did not compute
    assert 1 <= session.stats.prefilled - len(ids_of(engine, prompt)) <= 2
    assert session.stats.decode_seconds > 0


def test_a_budget_that_the_answer_leaves_no_room_for(engine, monkeypatch):
    say_next(monkeypatch, "abcdefghij")
    session = begun(engine, thinking=5)
    assert say(session, "Hi", max_new_tokens=5) == ""
    assert session.messages[-1] == {"role": "assistant", "content": "", "reasoning": "abcde"}
    with pytest.raises(ValueError, match="up to 2030 of the answer, 1 that end its thinking; max"):
        session.send("And?", max_new_tokens=2030)


def test_a_fork_goes_its_own_way(engine, monkeypatch):
    say_next(monkeypatch, "hm</think>Yes", "</think>one", "</think>two")
    parent = begun(engine)
    say(parent, "Hi")
    child = parent.fork()
    assert child.messages == parent.messages and child.stats == parent.stats
    assert say(parent, "And?") == "one" and say(child, "But?") == "two"
    assert parent.messages[-2:] == [
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": "one"},
    ]  # fmt: skip
    assert child.messages[-2]["content"] == "But?" and len(child.messages) == 5
    assert child.stats.reused == len(ids_of(engine, f"{BEGIN}high{USER}Hi{ANSWER}<think>")) + len(
        ids_of(engine, f"</think>Yes{END}{USER}")
    )
    child.messages[0]["content"] = "changed"
    assert child.messages[0]["content"] == "Be kind."


def test_a_turn_is_taken_back(engine, monkeypatch):
    say_next(monkeypatch, "</think>Yes", "</think>No", "</think>Maybe")
    session = begun(engine)
    with pytest.raises(ValueError, match="nothing was sent"):
        session.undo()
    say(session, "Hi")
    before = session.messages
    say(session, "And?")
    assert session.undo() == "And?" and session.messages == before
    assert say(session, "Anyway?") == "Maybe"
    assert session.stats.reused == len(
        ids_of(engine, f"{BEGIN}high{USER}Hi{ANSWER}<think></think>Yes{END}{USER}An")
    ), "with And? it has two letters in common"
    assert [session.undo(), session.undo()] == ["Anyway?", "Hi"]
    assert session.messages == before[:1]


def test_leaving_an_answer_early(engine, monkeypatch):
    say_next(monkeypatch, "hm</think>A long answer", "</think>x")
    session = begun(engine)
    answer = session.send("Hi")
    assert next(answer) + next(answer) == "A "
    assert session.messages[-1] == {"role": "assistant", "content": "A ", "reasoning": "hm"}
    say(session, "And?")
    assert f"</think>A {END}{USER}And?" in text_of(session)
    with pytest.raises(RuntimeError, match="an answer cannot go on after a later send"):
        next(answer)
    assert [m["content"] for m in session.messages[1:]] == ["Hi", "A ", "And?", "x"]
    assert not engine.scheduler.running and not engine.scheduler.waiting


def test_half_a_call_is_no_call(engine, monkeypatch):
    say_next(monkeypatch, f"So{HY3_CALL}", "x")
    session = engine.session(tools=TOOLS, thinking="no_think")
    answer = session.send("Hi", max_new_tokens=20)  # ends within the call
    assert "".join(answer).startswith("So") and session.calls == []
    assert "tool_calls" not in session.messages[-1]
    assert say(session, "And?") == "x"


def test_calls_of_strict_tools_follow_their_schemas(engine):
    city = {"enum": ["Moscow", "Paris"]}
    schema = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    tool = {"name": "find", "strict": True, "parameters": schema}
    session = engine.session(
        tools=[{"type": "function", "function": tool}], thinking="no_think", seed=1
    )
    [opens] = ids_of(engine, "<tool_calls>")
    list(session.send("Go", temperature=1.0, max_new_tokens=200, logit_bias={opens: 100.0}))
    assert session.calls and all(call.name == "find" for call in session.calls)
    assert {call.arguments["city"] for call in session.calls} <= {"Moscow", "Paris"}
    with pytest.raises(ValueError, match="one grammar; got regex and strict tools"):
        session.send("Go", regex="a")


class Failure(BaseException):
    """A failure that, like KeyboardInterrupt, is no Exception."""


def test_an_interruption_of_a_thought_that_nobody_saw(engine, monkeypatch):
    say_next(monkeypatch, "</think>Yes", "a long thought", "a long thought", "</think>x")
    session = begun(engine)
    say(session, "Hi")
    before, stats, tokens = session.messages, vars(session.stats) | {}, session.tokens
    run, calls = Runner.run, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise Failure
        return run(*arguments)

    for reasoning in (False, True):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Runner, "run", failing)
            with pytest.raises(Failure):
                list(session.send("And?", reasoning=reasoning, max_new_tokens=20))
        if not reasoning:
            assert session.messages == before and session.tokens == tokens
            assert vars(session.stats) == stats
    assert session.messages[-1]["content"] == ""
    assert "a long thought".startswith(session.messages[-1]["reasoning"])
    assert say(session, "So?") == "x"


def test_stop_strings_end_answers_and_no_thoughts(engine, monkeypatch):
    say_next(monkeypatch, "x END y</think>Yes, so END it is", "</think>x")
    session = begun(engine)
    assert say(session, "Hi", max_new_tokens=60, stop=["END"]) == "Yes, so "
    assert session.messages[-1]["content"] == "Yes, so "
    assert session.messages[-1]["reasoning"] == "x END y"
    assert say(session, "And?") == "x"
    assert not engine.scheduler.running


def test_a_schema_waits_for_the_end_of_the_thinking(engine, monkeypatch):
    left = say_next(monkeypatch, "hm</think>no JSON", None)
    session = begun(engine)
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    schema["x-guidance"] = {"whitespace_flexible": False}
    answer = say(session, "Hi", json_schema=schema, max_new_tokens=80)
    assert json.loads(answer) == {"a": 1} and not left
    assert session.messages[-1]["reasoning"] == "hm"


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("", {}, "the prompt is empty"),
        (5, {}, r"messages\[1\].content must be a string or a list of parts; got 5"),
        ("x" * 4000, {}, r"the conversation would hold 4\d\d\d tokens: 40\d\d as the template wri"),
        ("x", {"max_new_tokens": 2030}, r"up to 2030 of the answer; max_len=2048. Shorten"),
        ("x", {"temperature": -1}, "temperature must be >= 0"),
        ("x", {"n": 2}, "this is for one answer"),
    ],
)
def test_a_mistake_changes_nothing(engine, text, options, message):
    session = begun(engine)
    with pytest.raises(ValueError, match=message):  # at the call, not at the first piece
        session.send(text, **options)
    assert session.messages == [{"role": "system", "content": "Be kind."}]
    assert session.tokens == [] and session.stats.turns == 0


def test_what_is_no_session(engine):
    with pytest.raises(ValueError, match="thinking must be one of no_think, low, high or a number"):
        engine.session(thinking="deep")
    with pytest.raises(ValueError, match="must have a function with a name"):
        engine.session(tools=[{"type": "function"}])
    with pytest.raises(ValueError, match="seed must be"):
        engine.session(seed=-1)
    session = begun(engine)
    session.thinking = "deep"
    with pytest.raises(ValueError, match="thinking must be one of"):
        session.send("Hi")


def test_without_a_template_texts_are_sent_as_they_are(engine):
    plain = jaxcp.Engine(talkative_gpt(160), byte_level(), max_len=160)
    assert type(plain.session()) is Session
    for options, names in (({"thinking": 0}, "thinking"), ({"system": "x"}, "system"), (
        {"thinking": "low", "tools": TOOLS}, "thinking and tools"
    )):  # fmt: skip
        with pytest.raises(ValueError, match=f"chat template for {names}; this one has none"):
            plain.session(**options)
    session = engine.session(plain=True)
    assert type(session) is Session
    list(session.send("Hi", max_new_tokens=2))
    assert session.tokens[:2] == [*b"Hi"]
    with pytest.raises(ValueError, match="plain=True sends texts as they are"):
        engine.session(plain=True, thinking="low")


def test_control_tokens_in_a_message_are_text(engine, monkeypatch):
    say_next(monkeypatch, "</think>Yes", "</think>No")
    session = begun(engine)
    say(session, f"{END}{USER}</think>")
    say(session, "And?")
    end = ids_of(engine, END)[0]
    assert session.tokens.count(end) == 2 and session.stats.lost == 0
