# SPDX-License-Identifier: Apache-2.0
"""The commands' side of the shell: standard input, prompts, errors in a line, exit codes."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

ABOUT = "Long-context hybrid-MoE language models in JAX. `jaxcp --version` prints the version."
STDIN = "-"
DEBUG = "JAXCP_DEBUG"
"""The environment variable that asks for tracebacks."""
INTERRUPTED, BROKEN_PIPE, FAILED = 130, 141, 1  # 128 + the signal, as shells count
SAID_WELL = (ValueError, NotImplementedError, ImportError, FloatingPointError, OSError)
"""Errors whose message says what was needed; the message of another is shown with its kind."""
LONGEST = 300


def read_prompt(prompt: str | None, file: pathlib.Path | None) -> str:
    """Read the text of the file, then the prompt; `-` is standard input.

    With neither of them, what is piped in is the prompt.

    Raises:
      ValueError: no prompt, an empty one, standard input asked for twice, or text not in UTF-8.
      OSError: the file cannot be read.
    """
    if prompt is None and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError(f"no prompt: {WAYS}")
        file = pathlib.Path(STDIN)
    from jaxcp.text.tokenizer import read_text  # not above: `--help` need not read it

    if prompt == STDIN and str(file) == STDIN:
        raise ValueError("--prompt - and --prompt-file -: standard input can be read once")
    before = "" if file is None else read_stdin() if str(file) == STDIN else read_text(file)
    text = before + (read_stdin() if prompt == STDIN else prompt or "")
    if not text:
        raise ValueError(f"the prompt is empty: {WAYS}")
    return text


WAYS = "give --prompt TEXT, --prompt-file FILE, or pipe text in (-: standard input)"


def read_stdin() -> str:
    """Read all of standard input as UTF-8 text, line endings as they are."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"needed UTF-8 text; standard input has byte 0x{data[error.start]:02x} at offset "
            f"{error.start} ({error.reason})"
        ) from error


def talks_with_a_person() -> bool:
    """Tell whether both ends are a terminal: what is piped on holds answers only."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def read_lines() -> Iterator[str]:
    """Yield lines of standard input up to an empty one."""
    while True:
        try:
            line = input()
        except EOFError:
            return
        if not line:
            return
        yield line


def thinking_level(text: str | None) -> str | int | None:
    """Read a level of thinking as a person gives it: a number is a budget of tokens."""
    return int(text) if text is not None and text.isdecimal() else text


def at_least_one(**options: int | None) -> None:
    """Refuse an option below 1; None is one that was not given."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process as a command should: an error is a line on stderr and exit code 1, an
    interrupt 130, a reader that went away 141. With JAXCP_DEBUG set, errors keep their traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\njaxcp: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # the rest of the buffer would raise again as Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        print(f"jaxcp: {describe(error)}", file=sys.stderr)
        sys.exit(FAILED)


def describe(error: Exception) -> str:
    """Say to a person what went wrong."""
    text = str(error).strip()
    if isinstance(error, SAID_WELL) and text:
        return text
    if isinstance(error, MemoryError):
        return f"out of memory{': ' * bool(text)}{text} ({DEBUG}=1 shows where)"
    first = (text.splitlines() or ["no message"])[0]
    short = first if len(first) <= LONGEST else first[:LONGEST] + "..."
    return f"{type(error).__name__}: {short} ({DEBUG}=1 shows where)"
