# SPDX-License-Identifier: Apache-2.0
"""Print pip constraints that pin what jaxcp depends on to the lower bounds in pyproject.toml.

python .ci/lower_bounds.py [EXTRA ...] > bounds.txt
"""

import pathlib
import re
import sys
import tomllib

PROJECT = pathlib.Path(__file__).resolve().parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(\[[\w,-]+\])?(?P<versions>[^;]*)(?P<marker>;.*)?", re.DOTALL
)


def lower_bound(requirement: str) -> str:
    """`name==bound; marker` of `name[extra]>=bound,<limit; marker`."""
    parts = REQUIREMENT.fullmatch(requirement)
    assert parts is not None, requirement
    bounds = re.findall(r">=\s*([\w.]+)", parts["versions"])
    if len(bounds) != 1:
        raise SystemExit(f"pyproject.toml: needed one lower bound, >=; got {requirement!r}")
    return f"{parts['name']}=={bounds[0]}{parts['marker'] or ''}"


def constraints(extras: list[str]) -> list[str]:
    """The lower bounds of what is always needed and of the extras named."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    optional = project["optional-dependencies"]
    listed = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return [lower_bound(line) for line in listed if not line.startswith(f"{project['name']}[")]


if __name__ == "__main__":
    print("\n".join(constraints(sys.argv[1:])))
