# SPDX-License-Identifier: Apache-2.0
"""Regular expressions of llguidance's Lark for strings by a `pattern` or `format` of JSON Schema.

Patterns are ECMAScript's, which are searched for, where Lark has Rust's, which are whole. Where
validators differ in what a class has, such as digits beyond 0 to 9, none of that is written.
"""

import re
from collections.abc import Iterator

CLASSES = {"d": "0-9", "w": "A-Za-z0-9_", "s": r" \t\n\r\f\v"}
"""Characters of a class in all dialects."""
OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
IPV4 = rf"{OCTET}(?:\.{OCTET}){{3}}"
H16 = "[0-9A-Fa-f]{1,4}"
LS32 = f"(?:{H16}:{H16}|{IPV4})"
IPV6 = "|".join(
    (
        f"(?:{H16}:){{6}}{LS32}",
        f"::(?:{H16}:){{5}}{LS32}",
        *(f"(?:{H16}(?::{H16}){{0,{n}}})?::(?:{H16}:){{{4 - n}}}{LS32}" for n in range(5)),
        f"(?:{H16}(?::{H16}){{0,5}})?::{H16}",
        f"(?:{H16}(?::{H16}){{0,6}})?::",
    )
)
"""RFC 3986, section 3.2.2."""
LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
DATE = (
    f"(?:{YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|{LEAP}-02-29)"
)
CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
TIME = rf"{CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{CLOCK})"
CLOCK_SPAN = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
DAYS = "(?:[0-9]+D|[0-9]+M(?:[0-9]+D)?|[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?)"
LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST = rf"{LABEL}(?:\.{LABEL})*"
ATOM = r"[A-Za-z0-9!#$%&'*+\/=?^_`{|}~-]+"
PERCENT = "%[0-9A-Fa-f]{2}"
UNRESERVED = r"A-Za-z0-9._\~!$\&'()*+,;=\-"
PCHAR = f"(?:[{UNRESERVED}:@]|{PERCENT})"
AUTHORITY = (
    rf"(?:(?:[{UNRESERVED}:]|{PERCENT})*@)?(?:\[(?:{IPV6})\]|(?:[{UNRESERVED}]|{PERCENT})*)"
    "(?::[0-9]*)?"
)
PATHS = (
    rf"\/\/{AUTHORITY}(?:\/{PCHAR}*)*", rf"\/(?:{PCHAR}+(?:\/{PCHAR}*)*)?",
    rf"{PCHAR}+(?:\/{PCHAR}*)*", "",
)  # fmt: skip
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "duration": f"P(?:{DAYS}(?:{CLOCK_SPAN})?|{CLOCK_SPAN}|[0-9]+W)",
    "uuid": "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "email": rf"{ATOM}(?:\.{ATOM})*@{HOST}",
    "hostname": HOST,
    "ipv4": IPV4,
    "ipv6": IPV6,
    "uri": rf"[A-Za-z][A-Za-z0-9+.-]*:(?:{'|'.join(PATHS)})(?:\?(?:{PCHAR}|[\/?])*)?"
    rf"(?:#(?:{PCHAR}|[\/?])*)?",
}
"""RFC 3339 (dates, their spans, no leap seconds), 4122, 5321 (names without quotes), 1123, 3986."""
LONGEST = {"hostname": 253, "email": 254}
"""Characters of a format that has a limit."""
PIECE = re.compile(r"\\.|\(\?<?[=!]|[\s\S]", re.DOTALL)


def is_of_format(text: str, form: str) -> bool:
    """Tell whether a text is by one of `FORMATS`."""
    fits = re.fullmatch(FORMATS[form], text) is not None
    return fits and len(text) <= LONGEST.get(form, len(text))


def searched(pattern: str) -> str:
    """Write a `pattern` as a regular expression of all strings that have it somewhere.

    Raises:
      ValueError: it has an anchor elsewhere than at an end, or another look around.
    """
    ways = []
    for way in _alternatives(pattern):
        begin = "" if way[:1] == ["^"] else "(?s:.*)"
        end = "" if way[-1:] == ["$"] else "(?s:.*)"
        body = way[way[:1] == ["^"] : len(way) - (way[-1:] == ["$"])]
        ways.append(f"{begin}(?:{''.join(_translated(body, pattern))}){end}")
    return "|".join(ways)


def _alternatives(pattern: str) -> list[list[str]]:
    """Divide a pattern at the bars outside of all brackets, each part into its characters."""
    ways: list[list[str]] = [[]]
    depth, inside = 0, False
    for piece in PIECE.findall(pattern):
        if inside:
            inside = piece != "]"
        elif piece == "|" and not depth:
            ways.append([])
            continue
        else:
            inside = piece == "["
            depth += piece.startswith("(") - (piece == ")")
        ways[-1].append(piece)
    return ways


def _translated(pieces: list[str], pattern: str) -> Iterator[str]:
    """Yield the same in Rust's dialect."""
    inside = wide = False
    for number, piece in enumerate(pieces):
        if not inside and (piece in ("^", "$", r"\b", r"\B") or piece[:2] == "(?"):
            raise ValueError(f"the pattern {pattern!r} looks around, which no grammar does")
        if piece[0] == "\\" and piece[1:] in CLASSES and not wide:
            yield CLASSES[piece[1:]] if inside else f"[{CLASSES[piece[1:]]}]"
        elif piece == "." and not inside:
            yield r"[^\n\r\u2028\u2029]"
        elif inside and piece in "[&~":  # Rust's classes have sets within
            yield "\\" + piece
        elif piece in ("/", "\n", "\r"):
            yield {"/": r"\/", "\n": r"\n", "\r": r"\r"}[piece]
        else:
            yield piece
        inside = piece != "]" if inside else piece == "["
        wide = inside and (wide or (piece == "[" and pieces[number + 1 : number + 2] == ["^"]))
