# SPDX-License-Identifier: Apache-2.0
"""Renders a checkpoint's chat template as Hugging Face's transformers does, by jinja2's sandbox.

Same flags, filters and functions, so that the same text comes out; a test holds the two together.
A template comes with a checkpoint and is not trusted: it reaches no attribute of Python's own, and
what it is given is plain data.
"""

import datetime
import json
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from jaxcp.text.thinking import Levels, levels_of


class Template:
    """A chat template.

    Args:
      source: the text of the template.
      now: gives the time for templates that write today's date.
    Raises:
      ValueError: it is not well formed.
    """

    def __init__(self, source: str, now: Callable[[], datetime.datetime] = datetime.datetime.now):
        environment = _environment(now)
        try:
            parsed = environment.parse(source)
            self._compiled = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"needed a chat template of jinja2; {error!s:.300}") from error
        self.source = source
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(parsed))
        """Names that the template reads, `messages` among them."""
        self.literals = "\0".join(
            str(getattr(node, "data", None) or getattr(node, "value", ""))
            for node in parsed.find_all((jinja2.nodes.TemplateData, jinja2.nodes.Const))
        )
        """All that the template itself can write."""
        self.levels: Levels = levels_of(self.variables, source)
        """Levels of thinking, and the variables that ask for each."""

    def render(self, **variables: Any) -> str:
        """Render a conversation.

        Raises:
          ValueError: the template refuses it (`raise_exception`), or cannot be rendered with it.
        """
        try:
            return self._compiled.render(**variables)
        except Exception as error:  # whatever a template comes upon in data that it did not expect
            raise ValueError(
                f"the chat template of this checkpoint does not take these messages: {error!s:.500}"
            ) from error


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`, by which trainers find what assistants said: its body alone."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's)

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """The function `dict` of templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """The function `namespace` of templates, which keeps no name that begins as Python's own do."""

    def __init__(*args: Any, **kwargs: Any):
        self, *given = args  # `self` may be a name in the namespace
        attributes = dict(*given, **kwargs)
        jinja2.utils.Namespace.__init__(self)
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace takes no {name!r:.50}")
        super().__setitem__(name, value)


def _environment(now: Callable[[], datetime.datetime]) -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    environment.globals |= {"dict": _Dict(), "namespace": _Namespace}
    return environment


def to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as chat templates want it: jinja2's own filter would escape what HTML reads."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
