# SPDX-License-Identifier: Apache-2.0
"""The rules of a grammar in llguidance's Lark, with the markers of a format among its text."""

import json
from collections.abc import Callable
from typing import Any

from jaxcp.text.tools.reader import SYMBOL, Symbols

ANY_TEXT = "/(?s:.*)/"


class Rules:
    """Rules of a grammar, by names of their own.

    Args:
      ids: the id of a token, by the token.
    """

    def __init__(self, symbols: Symbols, ids: Callable[[str], int | None]):
        self._tokens = {symbol: f"<[{ids(token)}]>" for token, symbol in symbols.tokens.items()}
        self._symbols, self._lines = symbols, list[str]()

    def add(self, body: str, options: str = "") -> str:
        """Add a rule, and give its name."""
        name = f"r{len(self._lines)}"
        self._lines.append(f"{name}{options}: {body}")
        return name

    def add_terminal(self, body: str) -> str:
        """Add what one lexeme is made of, and give its name."""
        name = f"T{len(self._lines)}"
        self._lines.append(f"{name}: {body}")
        return name

    def json(self, schema: Any) -> str:
        """Add a rule for JSON by a schema."""
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        return self.add(f"%json {json.dumps(schema)}")

    def parts(self, text: str) -> list[str]:
        """Divide text with markers in it: tokens as a grammar names them, and other text as it is.

        Text is told from tokens by `is_token`.
        """
        pieces = SYMBOL.split(self._symbols.spell(text))
        return [self._tokens.get(piece, piece) for piece in pieces if piece]

    def written(self, text: str) -> str:
        """Write text that may have markers in it."""
        return " ".join(x if is_token(x) else json.dumps(x) for x in self.parts(text))

    def grammar(self, start: str) -> str:
        """Write the grammar that begins with `start`."""
        return "\n".join([f"start: {start}", *self._lines])


def is_token(part: str) -> bool:
    """Tell whether a part of a grammar names a token."""
    return part.startswith("<[")


def ended(rules: Rules, text: str, end: str) -> str:
    """Add the rule of a lexeme, and of what ends it; the lexeme has not that in it.

    Args:
      text: name of a terminal.
      end: a tag, which may have markers in it.
    """
    first, *rest = rules.parts(end)
    if is_token(first):
        return rules.add(" ".join([text, rules.written(end)]))
    # what ends it as text is part of its lexeme: a lexeme does not know what follows
    if not rest:
        return rules.add(text, f"[suffix={json.dumps(first)}]")
    with_end = rules.add_terminal(f"{text} {json.dumps(first)}")
    return rules.add(" ".join([with_end, *(x if is_token(x) else json.dumps(x) for x in rest)]))
