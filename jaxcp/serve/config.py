# SPDX-License-Identifier: Apache-2.0
"""Settings of a server."""

import dataclasses
import ipaddress
import math

SECONDS = ("request_seconds", "read_seconds", "write_seconds", "grace_seconds")
COUNTS = ("max_body_bytes", "max_requests", "max_choices", "max_connections", "default_new_tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Address, keys and limits of a server.

    Args:
      name: the name by which clients ask for the model.
      port: 0 takes a free one.
      api_keys: one of these must come with every request but those for `/` and `/health`; () asks
        for none.
      max_body_bytes: a larger request is refused with 413.
      max_requests: answers that run or wait at a time; one more is refused with 429.
      max_choices: the largest `n`.
      max_connections: connections at a time; on one more every request is answered with 503.
      default_new_tokens: tokens of an answer to a chat that names no limit.
      request_seconds: an answer that takes longer ends with an error.
      read_seconds: time for the head of a request, and again for its body.
      write_seconds: time that a reader may leave what is sent to it untaken.
      grace_seconds: time that answers have to finish after SIGTERM; those that have not are ended
        with an error. The process exits at most 5 seconds later.
      log_text: write prompts and answers into the log.
    Raises:
      ValueError: a limit is not positive, or a key is empty.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    max_body_bytes: int = 16 * 2**20
    max_requests: int = 256
    max_choices: int = 16
    max_connections: int = 1024
    default_new_tokens: int = 1024
    request_seconds: float = 600.0
    read_seconds: float = 30.0
    write_seconds: float = 30.0
    grace_seconds: float = 30.0
    log_text: bool = False

    def __post_init__(self):
        if not self.name:
            raise ValueError("the model needs a name; got an empty one")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be 0 to 65535; got {self.port}")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in SECONDS:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}")
        if not all(key.isascii() and key.isprintable() and key.strip() for key in self.api_keys):
            raise ValueError("an API key is printable ASCII with a character at least")

    @property
    def is_local(self) -> bool:
        """True if only this machine reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
