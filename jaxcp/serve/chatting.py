# SPDX-License-Identifier: Apache-2.0
"""Makes the job of a conversation, whichever interface it came by.

Thinking ends before a grammar begins, which is that of a schema or of a call of a tool, and after a
budget of tokens where there is one: then another request goes on with the answer. It finds in the
pool what the one before has computed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxcp.inference.request import Request
from jaxcp.inference.sampling import Sampling
from jaxcp.serve.errors import not_done, wrong
from jaxcp.serve.events import Job
from jaxcp.serve.model import Served
from jaxcp.serve.options import as_asked
from jaxcp.serve.reading import ChatReader
from jaxcp.text.constrained import AnswerGrammar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A conversation to go on with.

    Args:
      messages, tools: in OpenAI's form; calls of strict tools follow their schemas.
      thinking: a level of `Chat.thinking_levels`, a number of tokens, or None.
      variables: further ones for the template.
      max_tokens: of the answer; None takes the default.
      limit: the field that `max_tokens` comes from.
      schema: JSON schema that the answer follows.
      one_call: no second call of a tool.
      forced: names of tools one of which must be called; () for any of them, None for no such wish.
      sampling: makes the options of the engine.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    thinking: str | int | None = None
    variables: Mapping[str, Any] | None = None
    max_tokens: int | None = None
    limit: str = "max_tokens"
    stop: Sequence[str] = ()
    schema: Any = None
    one_call: bool = False
    forced: Sequence[str] | None = None
    sampling: Callable[..., Sampling]


def prompt_of(served: Served, task: Task) -> Any:
    """Render the conversation.

    Raises:
      Refusal: the model has no form for it, or refuses it.
    """
    chat = served.chat
    if chat is None:
        raise wrong("this model has no chat template: send its text to /v1/completions", "messages")
    return as_asked(
        chat.prompt,
        task.messages,
        tools=task.tools or None,
        thinking=task.thinking,
        variables=task.variables,
    )


def job_of(served: Served, task: Task) -> Job:
    """Render the conversation, and make its requests; for the workshop.

    Raises:
      Refusal: the conversation, or what is asked for, cannot be honored.
    """
    if task.schema is not None and task.tools:
        raise not_done("response_format with tools", "ask for one of them")
    prompt = prompt_of(served, task)
    room = served.room(
        len(prompt.ids), task.max_tokens, served.config.default_new_tokens, task.limit
    )
    schema = {} if task.schema is None else {"json_schema": task.schema}
    ends = sorted({*served.engine.stop_tokens, *prompt.stop_tokens})
    defaults = served.tokenizer.defaults
    sampling = task.sampling(ends=ends, defaults=defaults, max_new_tokens=room, **schema)
    grammar, special = _grammar(prompt, task, sampling), served.texts.special
    one_call = task.one_call or bool(task.forced)
    readers = [
        ChatReader(
            prompt,
            task.stop,
            special=special,
            one_call=one_call,
            grammar=grammar,
            ends=ends,
            most=sampling.max_new_tokens,
        )
        for _ in range(sampling.n)
    ]
    each = sampling.each()

    def part(choice: int, options: Sampling) -> Sampling:
        """The options of the request that goes on with an answer."""
        own = readers[choice].constrained.options(options.logit_bias)
        return dataclasses.replace(options, **({"json_schema": None} | own if grammar else own))

    def next_request(choice: int) -> Request:
        tokens, one = readers[choice].tokens, each[choice]
        rest = dataclasses.replace(one, max_new_tokens=one.max_new_tokens - len(tokens))
        return served.requests([*prompt.ids, *tokens], part(choice, rest))[0]

    requests = served.requests(prompt.ids, part(0, sampling))
    return Job(requests=requests, readers=readers, next_request=next_request)


def _grammar(prompt: Any, task: Task, sampling: Sampling) -> AnswerGrammar | None:
    """The grammars of the answer, where a schema, a call or strict tools are asked for.

    Raises:
      Refusal: they cannot be, of this model or beside what else is asked for.
    """
    param, name = ("tools", "strict") if task.forced is None else ("tool_choice", "tool_choice")
    several = not task.one_call
    try:
        if task.forced is None:
            grammar = prompt.strict_grammar(several=several)
        else:
            grammar = prompt.call_grammar(task.forced or None, several=several)
    except (NotImplementedError, ModuleNotFoundError) as error:
        instead = "leave it out" if task.forced is None else 'it may be "auto" or "none"'
        raise not_done(name, f"{instead}: {error}") from error
    except ValueError as error:
        raise wrong(f"{name}: {error}", param) from error
    if grammar is not None and sampling.compiled_grammar() is not None:
        raise wrong(f"an answer follows one grammar; got {name} and another", param)
    if grammar is None and (schema := sampling.json_schema) is not None:
        return as_asked(prompt.text_grammar, "json_schema", schema)
    return grammar
