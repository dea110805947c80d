# SPDX-License-Identifier: Apache-2.0
"""The common part of the answers of all interfaces."""

import dataclasses
import time
from typing import Any

from jaxcp.serve.chatting import job_of
from jaxcp.serve.events import Job
from jaxcp.serve.model import Served


@dataclasses.dataclass(kw_only=True)
class Form:
    """The answer to one request, in the form of one interface.

    An interface adds `chunks(events)`, the bytes of a stream, and `whole(events)`, its body.
    """

    served: Served
    ask: Any
    id: str
    job: Job = dataclasses.field(init=False)
    name: str = dataclasses.field(init=False)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def prepare(self) -> None:
        """Make the job; runs in the workshop.

        Raises:
          Refusal: what is asked for cannot be done.
        """
        self.served.check_model(self.ask.model)
        self.check()
        self.job = self.make()
        self.name = getattr(self.ask, "prompt_cache_key", None) or self.id

    def check(self) -> None:
        """Raise Refusal where fields ask for what is not done."""

    def make(self) -> Job:
        """Make the job of a conversation."""
        return job_of(self.served, self.ask.task(self.served))
