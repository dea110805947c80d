# SPDX-License-Identifier: Apache-2.0
"""One step as the scheduler wants it: rows, and the copies to make before.

The engine that runs plans owes this to the scheduler:

- Steps run in the order of their plans. A step first makes the copies of its plan, in the order of
  its fields, and then computes; when it reads a page or a state, earlier steps have written it.
- A row that starts at 0 starts from an empty state. After a step the state of a row is that after
  its accepted tokens, and is copied to `snapshot` where the row says so.
- Tokens lie in the page of their place as `pages.py` says. Slots behind a row's tokens hold
  anything: rejected drafts, or tokens of another row that the page was copied from.
- A plan may be made, and run, before the tokens of the plan before are read. The device then takes
  the latest token of a row from its own memory; if that is a stop token, it must not advance the
  state of the row. No draft is accepted behind a stop token; if one is, the answer is the same, but
  the turn ends without a snapshot.
"""

import dataclasses

from jaxcp.inference.host_store import Block
from jaxcp.inference.request import Request, Seat


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """The tokens at positions `start` to `start + count` of a request, the last `drafts` guessed.

    What it reads and writes is in the table of `seat`.
    """

    request: Request
    seat: Seat
    start: int
    count: int
    drafts: int = 0
    samples: bool = True
    """False in a chunk that ends inside the prompt."""
    together: bool = False
    """True where other rows may have their chunks in the same program."""
    snapshot: int | None = None
    """The state to which the row's own is copied after the step."""

    @property
    def meant(self) -> bool:
        """True while the request has this seat, and so wants what the step makes."""
        return self.request.seat is self.seat


@dataclasses.dataclass(kw_only=True, eq=False)
class Plan:
    """One step. A plan without rows is none: there is nothing to do, and no `advance`."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    pages_out: list[tuple[int, Block]] = dataclasses.field(default_factory=list)
    """(from, to) the host, of pages that are given up."""
    states_out: list[tuple[int, Block]] = dataclasses.field(default_factory=list)
    page_copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(from, to), where a shared prefix ends inside a page; both may be the same."""
    state_copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """(from, to), from a snapshot to the state of a row; both may be the same."""
    pages_in: list[tuple[Block, int]] = dataclasses.field(default_factory=list)
    """(from, to) pages of a row that begins with what is on the host."""
    states_in: list[tuple[Block, int]] = dataclasses.field(default_factory=list)
