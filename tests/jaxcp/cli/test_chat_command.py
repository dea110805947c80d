# SPDX-License-Identifier: Apache-2.0
"""`jaxcp chat` by a template: at a terminal of its own, and in a pipe."""

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from said_answers import say_next
from tiny_chat import write_tiny_chat

import jaxcp
from jaxcp.cli.conversation import Conversation
from jaxcp.cli.main import main

TESTS = Path(__file__).resolve().parents[2]
PATHS = [str(TESTS.parent), str(TESTS)]  # in this order: tests has a folder jaxcp, too
SAYING = """
import fcntl, signal, sys, termios
sys.path[:0] = {paths!r}
if sys.stdin.isatty():  # whose Ctrl-C is for this process
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from said_answers import say_next

class Patch:
    setattr = staticmethod(setattr)

say_next(Patch, *{texts!r})
from jaxcp.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_tiny_chat(tmp_path_factory.mktemp("chat") / "hy3", "hy3", 2048)
    advice = {"do_sample": True, "temperature": 0.9, "top_p": 0.8}
    (folder / "generation_config.json").write_text(json.dumps(advice))
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    model, tokenizer = jaxcp.load(folder)
    return jaxcp.Engine(model, tokenizer, max_len=2048)


def script(tmp_path, *texts):
    """A program that is `jaxcp` with a model that says `texts`."""
    path = tmp_path / "saying.py"
    path.write_text(SAYING.format(paths=PATHS, texts=texts), encoding="utf-8")
    return [sys.executable, str(path)]


class Terminal(contextlib.AbstractContextManager):
    """A process at a terminal, until the end of the block."""

    def __init__(self, command):
        self.fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        )  # fmt: skip
        os.close(inner)
        self.seen = ""

    def until(self, text, seconds=240):
        """Read until `text` comes; what came since the last call."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no {text!r} in {self.seen!r}")
            try:
                self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
            except OSError as error:  # it has ended
                raise AssertionError(f"no {text!r} in {self.seen!r}") from error
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, line):
        os.write(self.fd, f"{line}\n".encode())

    def interrupt(self, text):
        """Press Ctrl-C until `text` comes: between a prompt and its reading one is lost."""
        for _ in range(24):
            os.write(self.fd, b"\x03")
            with contextlib.suppress(TimeoutError):
                return self.until(text, 10)
        raise AssertionError(f"no {text!r} in {self.seen!r}")

    def wait(self):
        """Read the rest, and give the exit code."""
        with contextlib.suppress(OSError):
            while os.read(self.fd, 65536):
                pass
        return self.process.wait(60)

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.mark.slow
def test_a_person_at_a_terminal(folder, tmp_path):
    command = script(
        tmp_path, "hm, hm</think>Yes\x1b[31m", "</think>No", "</think>a long answer" * 40, "One"
    )
    options = ["chat", "--checkpoint", str(folder), "--thinking", "low", "--system", "Be kind."]
    with Terminal([*command, *options]) as terminal:
        terminal.until("> ")
        terminal.type("Hi")
        answer = terminal.until("prefilled")
        assert "thinking: ..." in answer and "thought for" in answer, "it is folded"
        assert "\x1b[31m" not in answer and "␛[31m" in answer, "a model steers no terminal"
        assert re.search(r"\d+ tokens, [\d.]+ a second; 0 reused, \d+ prefilled", answer)
        terminal.until("> ")
        terminal.type("/thoughts")
        assert "hm, hm" in terminal.until("> ")
        terminal.type("And?")
        answer = terminal.until("prefilled")
        assert "No" in answer and re.search(r"; \d\d reused, \d+ lost, ", answer)
        terminal.until("> ")
        terminal.type("More")
        terminal.until("a long answer")
        terminal.interrupt(", stopped")
        terminal.until("> ")
        terminal.type("/undo")
        assert "taken back: More" in terminal.until("> ")
        terminal.type("/think no_think")
        terminal.type("Well?")
        assert "One" in terminal.until("prefilled")
        terminal.until("> ")
        os.write(terminal.fd, b"half a line")
        terminal.interrupt("/quit or Ctrl-D ends")
        terminal.type(f"/save {tmp_path / 'said.json'}")
        terminal.until("saved 7 messages")
        terminal.type("/quit")
        assert terminal.wait() == 0
    messages = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    assert messages[1:] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes\x1b[31m", "reasoning": "hm, hm"},
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No"},
        {"role": "user", "content": "Well?"}, {"role": "assistant", "content": "One"},
    ]  # fmt: skip


@pytest.mark.slow
def test_a_pipe_has_answers_alone(folder, tmp_path):
    command = script(tmp_path, "hm</think>Yes", "</think>/help is a text")
    options = ["chat", "--checkpoint", str(folder), "--thinking", "high"]
    done = subprocess.run(
        [*command, *options], input="Hi\n/help\n", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout == "Yes\n/help is a text\n", done.stderr
    assert len(re.findall(r"\[\d+ tokens prefilled", done.stderr)) == 2


def conversation(engine, monkeypatch, *lines, **options):
    """Give the screen after a person has said these lines, and the conversation."""
    said, screen = iter(lines), io.StringIO()
    prompts = []

    def typed(prompt):
        prompts.append(prompt)
        line = next(said, "")
        if isinstance(line, BaseException):
            raise line
        return line

    def send(session, text):
        return session.send(text, max_new_tokens=30, reasoning=True)

    monkeypatch.setattr("builtins.input", typed)
    console = Console(file=screen, force_terminal=False, width=80)
    talk = Conversation(engine.session(**options), send, console)
    talk.run()
    return screen.getvalue(), talk, prompts


def test_branches(engine, monkeypatch):
    say_next(monkeypatch, "Yes", "one", "two")
    screen, talk, prompts = conversation(
        engine,
        monkeypatch,
        "Hi",
        "/fork",
        "And?",
        "/fork 1",
        "But?",
        "/fork 3",
        thinking="no_think",
    )
    assert prompts == ["> ", "> ", "2> ", "2> ", "1> ", "1> ", "1> "]
    assert [[m["content"] for m in s.messages] for s in talk.branches] == [
        ["Hi", "Yes", "But?", "two"], ["Hi", "Yes", "And?", "one"],
    ]  # fmt: skip
    assert "! the branches are 1 to 2; got 3" in screen


def test_commands_say_what_is_wrong(engine, monkeypatch, tmp_path):
    screen, talk, _ = conversation(
        engine, monkeypatch, "/undo", "/think deep", "/think", "/think 64", "/system Be kind.",
        "/nothing", "/save", f"/save {tmp_path}", "/thoughts", "/help", KeyboardInterrupt(),
    )  # fmt: skip
    for said in (
        "! there is nothing to take back", "! thinking must be one of no_think, low, high",
        "thinking: as the template does (levels: no_think, low, high)", "thinking: 64 (levels",
        "system: Be kind.", "! there is no command /nothing; /help", "! needed the name of a file",
        "Is a directory", "it has not thought yet", "Ctrl-C stops an answer",
        "/quit or Ctrl-D ends",
    ):  # fmt: skip
        assert said in screen, said
    assert (talk.session.thinking, talk.session.system) == (64, "Be kind.")


def test_a_line_that_begins_with_a_space_is_sent(engine, monkeypatch):
    say_next(monkeypatch, "Yes")
    _, talk, _ = conversation(engine, monkeypatch, " /help", "/quit", "never", thinking="no_think")
    assert talk.session.messages[0]["content"] == " /help"


def test_a_conversation_without_a_template_has_no_messages(engine, monkeypatch):
    commands = ("/system x", "/think low", "/thoughts", "/undo", "/save x", "/fork")
    screen, talk, _ = conversation(engine, monkeypatch, *commands, plain=True)
    assert screen.count("! this checkpoint has no chat template") == 5
    assert len(talk.branches) == 2 and "branch 2 of 2" in screen


def asked(monkeypatch, capsys, *arguments):
    """The options of sampling that a command came to."""
    seen = []

    def request(engine, prompt, sampling):
        seen.append((list(prompt), sampling))
        raise ValueError("that is enough")

    monkeypatch.setattr(jaxcp.Engine, "request", request)
    with contextlib.suppress(SystemExit):
        main([str(x) for x in arguments])
    capsys.readouterr()
    return seen[0]


def test_what_the_checkpoint_advises_is_for_those_who_say_nothing(folder, monkeypatch, capsys):
    generate = ["generate", "--checkpoint", folder, "--prompt", "Hi"]
    ids, sampling = asked(monkeypatch, capsys, *generate)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.9, 0.8, None)
    assert ids == [*b"Hi"], "the text itself, and no template"
    _, sampling = asked(monkeypatch, capsys, *generate, "--temperature", 0, "--top-k", 5)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.8, 5)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    ids, sampling = asked(monkeypatch, capsys, "chat", "--checkpoint", folder, "--thinking", "64")
    assert (sampling.temperature, sampling.max_new_tokens) == (0.9, 2048 - len(ids) - 1 + 1)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    _, sampling = asked(monkeypatch, capsys, "chat", "--checkpoint", folder, "--ignore-eos")
    assert sampling.stop_tokens == ()
