# SPDX-License-Identifier: Apache-2.0
"""A network of two hosts on one machine, whose link can be cut: nothing is closed, nothing answers.

Two network namespaces, joined by a pair of virtual cards. Needs root, and Linux with `ip`.
"""

import contextlib
import ctypes
import dataclasses
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator

NEW_NAMES = 0x04000000  # CLONE_NEWUTS
NEW_NETWORK = 0x40000000  # CLONE_NEWNET


@dataclasses.dataclass(frozen=True)
class Link:
    """The two sides, by the number of the process that made them."""

    owner: int

    def namespace(self, side: int) -> str:
        return f"jaxcp-{self.owner}-{'ab'[side % 2]}"

    def card(self, side: int) -> str:
        return f"jx{self.owner}{'ab'[side % 2]}"

    def address(self, side: int) -> str:
        return f"10.211.77.{1 + side % 2}"

    def enter(self, number: int) -> None:
        """Move this process, which has one thread, to its side: even numbers to the first.

        Its host is called by its address, as gloo listens where the name of its host leads.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        namespace = os.open(f"/var/run/netns/{self.namespace(number)}", os.O_RDONLY)
        for called in (libc.setns(namespace, NEW_NETWORK), libc.unshare(NEW_NAMES)):
            if called:
                raise OSError(ctypes.get_errno(), "this process cannot enter its namespace")
        os.close(namespace)
        socket.sethostname(self.address(number))

    def cut(self) -> None:
        """Take the link down."""
        ip("-n", self.namespace(0), "link", "set", self.card(0), "down")

    def mend(self) -> None:
        """Bring it up again."""
        ip("-n", self.namespace(0), "link", "set", self.card(0), "up")


def ip(*words: str) -> None:
    """Run `ip`.

    Raises:
      PermissionError: it is not there, or may not do this.
    """
    if shutil.which("ip") is None:
        raise PermissionError("there is no command ip")
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def linked() -> Iterator[Link]:
    """Make the two sides, and take them away at the end.

    Raises:
      PermissionError: this machine does not let us.
    """
    link = Link(os.getpid())
    try:
        for side in range(2):
            ip("netns", "add", link.namespace(side))
        ip("link", "add", link.card(0), "type", "veth", "peer", "name", link.card(1))
        for side in range(2):
            name, card = link.namespace(side), link.card(side)
            ip("link", "set", card, "netns", name)
            ip("-n", name, "addr", "add", f"{link.address(side)}/24", "dev", card)
            ip("-n", name, "link", "set", card, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield link
    finally:
        for side in range(2):
            with contextlib.suppress(PermissionError):
                ip("netns", "del", link.namespace(side))
        with contextlib.suppress(PermissionError):
            ip("link", "del", link.card(0))
