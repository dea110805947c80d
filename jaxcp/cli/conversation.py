# SPDX-License-Identifier: Apache-2.0
"""A conversation at a terminal: answers as they come, thinking folded, commands that begin with /.

Knows sessions, and nothing of models, devices or options of sampling.
"""

import contextlib
import importlib
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from jaxcp.cli.terminal import thinking_level

HELP = """\
/system TEXT   what the model is told before all else; alone: shows it
/think LEVEL   how much it thinks from now on, or a number of tokens; alone: shows the levels
/thoughts      what it thought before its latest answer
/fork          a branch with the same past, in which you go on; /fork NUMBER: back to another one
/undo          take back what you said last, and the answer
/save FILE     the messages as JSON
/help, /quit   this; the end, as an empty line or Ctrl-D
Ctrl-C stops an answer at its next token, pressed again at once; the conversation goes on.
A line that begins with a space is no command."""
NO_TEMPLATE = "this checkpoint has no chat template: it goes on with the text, and has no messages"
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
"""Control characters as symbols: nothing that a model writes steers the terminal."""
TAIL = 60
"""Characters of a thought that are shown while it goes on."""

Send = Callable[[Any, str], Generator[str, None, None]]


class Conversation:
    """Sessions that a person talks to, one at a time.

    Args:
      session: the first branch.
      send: begins the answer of a session to a text.
    """

    def __init__(self, session: Any, send: Send, console: Console):
        self.branches, self.number = [session], 0
        self._send, self._console, self._open = send, console, True

    @property
    def session(self) -> Any:
        return self.branches[self.number]

    def run(self) -> None:
        """Talk until an empty line, the end of the file or /quit."""
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # `input` then edits lines, and knows earlier ones
        while self._open:
            try:
                line = input(f"{self.number + 1}> " if len(self.branches) > 1 else "> ")
                if not line:
                    return
                self._obey(line)
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:  # wherever it comes, what was said stays
                self._note("\n/quit or Ctrl-D ends the conversation")

    def _obey(self, line: str) -> None:
        try:
            self._command(line) if line.startswith("/") else self._answer(line)
        except (ValueError, OSError) as error:
            self._console.print(Text(f"! {error}", style="red"), soft_wrap=True)

    def _answer(self, line: str) -> None:
        view = _View(self._console)
        with first_interrupt() as stop:
            try:
                with view, contextlib.closing(self._send(self.session, line)) as pieces:
                    for piece in pieces:
                        view.show(piece)
                        if stop.is_set():
                            break
            except KeyboardInterrupt:
                stop.set()
        self._note("\n" + numbers_of(self.session.stats) + ", stopped" * stop.is_set())

    def _command(self, line: str) -> None:
        name, _, text = line[1:].partition(" ")
        run = COMMANDS.get(name)
        if run is None:
            raise ValueError(f"there is no command /{name}; /help names those that there are")
        if name in OF_MESSAGES and not hasattr(self.session, "messages"):
            raise ValueError(NO_TEMPLATE)
        run(self, text.strip())

    def _note(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def set_system(self, text: str) -> None:
        if text:
            self.session.system = text
        self._note(f"system: {self.session.system or 'nothing'}")

    def set_thinking(self, text: str) -> None:
        session = self.session
        if text:
            level = thinking_level(text)
            session.engine.session(thinking=level)  # says which there are
            session.thinking = level
        levels = ", ".join(session.engine.tokenizer.chat.thinking_levels) or "none"
        now = "as the template does" if session.thinking is None else session.thinking
        self._note(f"thinking: {now} (levels: {levels})")

    def show_thoughts(self, text: str) -> None:
        thoughts = [m["reasoning"] for m in self.session.messages if "reasoning" in m]
        self._note(_shown(thoughts[-1]) if thoughts else "it has not thought yet")

    def fork(self, text: str) -> None:
        if not text:
            self.branches.append(self.session.fork())
            text = str(len(self.branches))
        if not text.isdecimal() or not 1 <= int(text) <= len(self.branches):
            raise ValueError(f"the branches are 1 to {len(self.branches)}; got {text}")
        self.number = int(text) - 1
        self._note(f"branch {text} of {len(self.branches)}")

    def undo(self, text: str) -> None:
        self._note(f"taken back: {_shown(self.session.undo())}")

    def save(self, text: str) -> None:
        if not text:
            raise ValueError("needed the name of a file: /save FILE")
        messages = json.dumps(self.session.messages, ensure_ascii=False, indent=2)
        pathlib.Path(text).expanduser().write_text(messages + "\n", encoding="utf-8")
        self._note(f"saved {len(self.session.messages)} messages in {text}")

    def show_help(self, text: str) -> None:
        self._note(HELP)

    def quit(self, text: str) -> None:
        self._open = False


COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "system": Conversation.set_system,
    "think": Conversation.set_thinking,
    "thoughts": Conversation.show_thoughts,
    "fork": Conversation.fork,
    "undo": Conversation.undo,
    "save": Conversation.save,
    "help": Conversation.show_help,
    "quit": Conversation.quit,
}
OF_MESSAGES = ("system", "think", "thoughts", "undo", "save")


class _View:
    """Shows one answer: a line of its thinking while that goes on, then its text."""

    def __init__(self, console: Console):
        self._console, self._thought, self._begin = console, "", 0.0
        self._live: Live | None = None

    def __enter__(self) -> "_View":
        return self

    def __exit__(self, *error: Any) -> None:
        self._fold()

    def show(self, piece: str) -> None:
        """Show the next piece."""
        if getattr(piece, "kind", "text") == "text":
            self._fold()
            self._console.print(Text(_shown(piece)), end="", soft_wrap=True)
            return
        if self._live is None:
            self._begin = time.monotonic()
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        self._thought += piece
        tail = " ".join(self._thought[-TAIL:].split())
        self._live.update(Text(f"thinking: ...{_shown(tail)}", style="dim"), refresh=True)

    def _fold(self) -> None:
        if self._live is None:
            return
        self._live.stop()
        self._live = None
        seconds = time.monotonic() - self._begin
        note = f"thought for {seconds:.1f} s (/thoughts shows it)"
        self._console.print(Text(note, style="dim"), soft_wrap=True)


@contextlib.contextmanager
def first_interrupt() -> Iterator[threading.Event]:
    """Set the event at the first Ctrl-C, in place of an interrupt in the middle of a step; at the
    next one raise KeyboardInterrupt."""
    event = threading.Event()

    def note(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def numbers_of(stats: Any) -> str:
    """Say how fast the latest answer came and what it found."""
    lost = f", {stats.lost:,} lost" if stats.lost else ""
    return (
        f"{stats.generated:,} tokens, {stats.decode_tokens_per_second:.1f} a second; "
        f"{stats.reused:,} reused{lost}, {stats.prefilled:,} prefilled"
    )


def _shown(text: str) -> str:
    return text.translate(PICTURES | {0x7F: 0x2421, 0x9B: 0x241B})
