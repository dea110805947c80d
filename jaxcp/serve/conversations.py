# SPDX-License-Identifier: Apache-2.0
"""Conversations that the pool still holds, and the pages that are theirs.

The engine finds a prefix again by its tokens alone. Here it is remembered who said them: by the
`prompt_cache_key` of a request, or by the request itself. What extends a conversation takes its
place.
"""

import collections
import dataclasses
import time
from array import array
from typing import Any

from jaxcp.inference import Engine
from jaxcp.inference.request import Request

MOST = 64
"""Conversations that are remembered: to list them takes time of the engine."""
CELLS = 4096
"""Pages a shard of which a picture shows each; of a larger shard it shows every so many-th."""


@dataclasses.dataclass(kw_only=True)
class Conversation:
    """Tokens that were said under one name."""

    name: str
    tokens: array
    request: Request | None = None
    """The one that runs."""
    turns: int = 1
    used: float = dataclasses.field(default_factory=time.time)


class Conversations:
    """The latest ones. All methods are for the engine's thread, between two steps."""

    def __init__(self):
        self._latest: collections.OrderedDict[str, Conversation] = collections.OrderedDict()

    def begin(self, name: str, request: Request, *, named: bool) -> None:
        """Take note of a request; one without a name of its own takes that of what it goes on
        with."""
        before = self._latest.get(name) if named else self._that_goes_on(request)
        turns = 1 if before is None else before.turns + 1
        if before is not None:
            name = before.name
        self._latest[name] = Conversation(
            name=name, tokens=request.tokens, request=request, turns=turns
        )
        self._latest.move_to_end(name)
        while len(self._latest) > MOST:
            self._latest.popitem(last=False)

    def _that_goes_on(self, request: Request) -> Conversation | None:
        """The longest conversation of which the prompt is a continuation."""
        prompt, best = request.tokens, None
        for one in self._latest.values():
            if one.request is not None and not one.request.done:
                continue
            longer = best is None or len(one.tokens) > len(best.tokens)
            if longer and prompt[: len(one.tokens)] == one.tokens:
                best = one
        return best

    def held(self, engine: Engine) -> list[dict[str, Any]]:
        """Describe each conversation of which the pool holds something, the latest first."""
        rows = []
        for one in reversed(self._latest.values()):
            table, tokens = self._table(engine, one)
            idle = one.request is None or one.request.done
            on_host = self._known(engine, one) - tokens if idle else 0
            if idle and not tokens and not on_host:
                continue
            places = ["device"] * bool(tokens or not idle) + ["host"] * bool(on_host)
            group = one.request.group if one.request is not None else 0
            pages = engine.groups.schedulers[group].pages
            shards = [pages.on_shard(len(table), shard) for shard in range(pages.shards)]
            status = "idle" if idle or one.request is None else one.request.status.value
            rows.append(
                {
                    "id": one.name,
                    "object": "session",
                    "status": status,
                    "turns": one.turns,
                    "tokens": len(one.tokens),
                    "tokens_held": tokens,
                    "tokens_on_host": on_host,
                    "where": " and ".join(places),
                    "group": group,
                    "pages": len(table),
                    "pages_per_shard": shards,
                    "bytes_per_device": engine.bytes_per_device(tokens) if tokens else 0,
                    "last_used": round(one.used, 3),
                }
            )
        return rows

    def picture(self, engine: Engine) -> dict[str, Any]:
        """Say of every page how many hold it, and who came first; of a page that nobody holds but
        the memory of prefixes, whose conversation it is."""
        owners = list(reversed(self._latest.values()))
        groups = []
        for number, scheduler in enumerate(engine.groups.schedulers):
            pages = scheduler.pages
            users: dict[int, list[int]] = collections.defaultdict(list)
            for index, one in enumerate(owners):
                if one.request is None or one.request.group == number:
                    for page in self._table(engine, one)[0]:
                        users[page].append(index)
            kept = set(scheduler.tree.pages())
            running = collections.Counter(
                page for r in scheduler.running if r.seat is not None for page in r.seat.table
            )
            step = -(-pages.pages_per_shard // CELLS)
            groups.append(
                {
                    "page_size": pages.page_size,
                    "pages_per_shard": pages.pages_per_shard,
                    "pages_per_cell": step,
                    "shards": [
                        [
                            _cell(shard * pages.pages_per_shard + i, users, kept, running)
                            for i in range(0, pages.pages_per_shard, step)
                        ]
                        for shard in range(pages.shards)
                    ],
                }
            )
        names = [
            {"id": one.name, "running": one.request is not None and not one.request.done}
            for one in owners
        ]
        return {"object": "pool", "sessions": names, "groups": groups}

    def _known(self, engine: Engine, one: Conversation) -> int:
        """Count the first tokens of a conversation that need not be computed again."""
        group = one.request.group if one.request is not None else 0
        return engine.groups.schedulers[group].tree.known(one.tokens)

    def _table(self, engine: Engine, one: Conversation) -> tuple[list[int], int]:
        """Pages that hold its beginning, and how many tokens that is."""
        request = one.request
        if request is not None and request.seat is not None:
            return list(request.seat.table), request.seat.computed
        scheduler = engine.groups.schedulers[request.group if request is not None else 0]
        return scheduler.tree.table(one.tokens)


def _cell(page, users, kept, running) -> list[int]:
    """Owner, conversations that have it, rows that hold it; owner -1: free, -2: nobody known."""
    if page in users:
        return [users[page][0], len(users[page]), running[page]]
    return [-2 if page in kept or running[page] else -1, 0, running[page]]
