# SPDX-License-Identifier: Apache-2.0
"""Bundles of a grid step that has nothing to do: the shortest way through a TPU kernel's loop.

`pl.when` is a branch over what it guards. Every branch is taken here but those over all of the
kernel's work, which the pipeline takes before its first step and after its last one: what is left
is what each step pays. Format as in `jaxcp/compile/tpu_code.py`.
"""

import pathlib
import re

from jaxcp.compile.tpu_code import BUNDLE, Kernel

BRANCH = re.compile(r"= sbr\.rel \([^)]*\) target = \$region(\d+)")
EMPTY = re.compile(r"Start/End empty region (\d+)")
DELAY = 4  # bundles after a branch that still run


def bundles(program: str, kernel: Kernel) -> int:
    """Count the bundles of the shortest way round the hot code, through its loop.

    Raises:
      ValueError: there is no such way; the format changed.
    """
    branches, places, looped = {}, {}, []
    for line in program.splitlines():
        if not (bundle := BUNDLE.match(line)):
            continue
        index = int(bundle[1] or "0", 16)
        if ">" in bundle[2]:
            looped.append(index)
        for region in EMPTY.findall(line):
            places[int(region)] = index
        if branch := BRANCH.search(line):
            branches[index] = int(branch[1])
    hot = [h.first for h in kernel.hot]
    first, last = min(looped), max(looped)
    least = {first: 0}
    for at in range(first, last):
        if at not in least:
            continue  # jumped over
        ways = [(at + 1, 1)]
        target = places.get(branches.get(at, -1), -1)
        if target > at and not all(at < h < target for h in hot):
            ways.append((target, 1 + DELAY))
        for to, cost in ways:
            least[to] = min(least.get(to, last), least[at] + cost)
    if least[last] >= min(h.bundles for h in kernel.hot):
        raise ValueError("found no way around the hot code of a kernel; the format changed")
    return least[last]


def read(folder: pathlib.Path, kernels: dict[str, Kernel]) -> dict[str, int]:
    """Count for each kernel that was dumped into `folder`."""
    by_name = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        name = re.fullmatch(r"\d+-(.+?)(?:\.\d+)?-\d+-final_bundles\.txt", path.name)
        if name and name[1] in kernels:
            by_name[name[1]] = bundles(path.read_text(), kernels[name[1]])
    return by_name
