# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, how large a file may grow, and what every file starts with."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = "jaxcp.configs"
PACKAGES = ("pallas_kernels", "jaxcp")
OURS = (*PACKAGES, "configs", "examples", "benchmarks", "tests")
LICENSE = "# SPDX-License-Identifier: Apache-2.0\n"

# A room may import rooms above it and its own. A new room of jaxcp is put here first.
RANKS = (
    ("pallas_kernels", "jaxcp.accelerators", "jaxcp.flax_version", "jaxcp.input_files"),
    ("jaxcp.mesh", "jaxcp.layout", "jaxcp.sharding", "jaxcp.processes"),
    ("jaxcp.context_parallel",),
    ("jaxcp.attention",),
    ("jaxcp.layers",),
    ("jaxcp.models",),
    ("jaxcp.text", "jaxcp.data", "jaxcp.checkpoints"),
    ("jaxcp.weights",),
    ("jaxcp.inference",),
    ("jaxcp.evaluate",),
    ("jaxcp.training",),
    ("jaxcp.compile",),
    ("jaxcp.tune",),
    ("jaxcp.serve",),
    ("jaxcp.cli",),
    (CONFIGS, "jaxcp.__main__"),  # configs are written as a user writes them: from the root
)
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
# What a room never imports, though the order would allow it: a library, or a room.
NEVER = {
    "jaxcp.context_parallel": {"flax"},
    "jaxcp.attention": {"flax"},
    "jaxcp.text": {"jax", "flax", "jaxcp.models", "jaxcp.layers", "pallas_kernels"},
    "jaxcp.data": {"flax", "jaxcp.models", "jaxcp.layers", "jaxcp.text"},
    "jaxcp.serve": {"jax", "flax", "jaxcp.models", "jaxcp.training", "jaxcp.tune"},
}
# The host side of the engine: plain Python that can be tested without a device.
HOST = {
    f"jaxcp.inference.{name}"
    for name in (
        "chunks",
        "groups",
        "guesses",
        "host_store",
        "limits",
        "pages",
        "plan",
        "prefix_tree",
        "request",
        "scheduler",
    )
}
KERNEL_LIBRARIES = {"pallas_kernels", "jax", "numpy", "jaxtyping", *sys.stdlib_module_names}
BACKENDS = ("reference", "xla", "triton", "mosaic_tpu")

SOURCES = sorted(path for folder in OURS for path in ROOT.joinpath(folder).rglob("*.py"))
PRODUCT = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in PACKAGES]


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in SOURCES}


def imports_of(path):
    """Every module that the file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: absolute imports only"
            for alias in node.names:  # `from jaxcp import layout` names the module, not the root
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def room_of(module):
    parts = module.split(".")
    return parts[0] if parts[0] != "jaxcp" else ".".join(parts[:2])


def backend_of(module):
    """The backend a module of pallas_kernels belongs to; `triton_backward.py` is triton's."""
    name = module.split(".")[-1]
    fitting = [backend for backend in BACKENDS if name == backend or name.startswith(backend + "_")]
    return fitting[0] if module.startswith("pallas_kernels.") and fitting else None


def violations(module, imported, strategies=frozenset()):
    """What is wrong with `module` importing `imported`."""
    top = imported.split(".")[0]
    if imported.startswith(CONFIGS) or (top in OURS and top not in PACKAGES):
        yield "no package imports configs, examples, benchmarks or tests"
    if module.startswith("pallas_kernels") and top not in KERNEL_LIBRARIES:
        yield "pallas_kernels stands on jax and numpy alone"
    if module in HOST and imported not in HOST and top not in sys.stdlib_module_names:
        yield "the host side of the engine is plain Python"
    for never in {top, room_of(imported)} & NEVER.get(room_of(module), set()):
        yield f"{room_of(module)} knows no {never}"
    if top not in PACKAGES or module == "jaxcp":
        return
    if imported == "jaxcp" and room_of(module) not in (CONFIGS, "jaxcp.cli"):
        yield "below the command line, import the module that has it, not the root"
    elif imported != "jaxcp" and RANK[room_of(imported)] > RANK[room_of(module)]:
        yield f"{room_of(module)} stands under {room_of(imported)}"
    ours, theirs = module.split("."), imported.split(".")
    family = [
        name[2] if name[:2] == ["jaxcp", "models"] and name[3:] else "" for name in (ours, theirs)
    ]
    if all(family) and family[0] != family[1]:
        yield "models never import models"
    if module in strategies and imported in strategies and module != imported:
        yield "strategies never import strategies"
    backends = backend_of(module), backend_of(imported)
    if all(backends) and backends[0] != backends[1]:
        yield "a backend never imports another backend"


def strategy_modules():
    folder = ROOT / "jaxcp" / "context_parallel"
    subclass = re.compile(r"^class \w+\(Strategy\)", re.MULTILINE)
    return {module_of(path) for path in folder.glob("*.py") if subclass.search(path.read_text())}


def test_import_direction():
    strategies = strategy_modules()
    found = [
        f"{module_of(path)} imports {imported}: {reason}"
        for path in PRODUCT
        for imported in imports_of(path)
        for reason in violations(module_of(path), imported, strategies)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("jaxcp.layers.attention", "jaxcp.models.gpt.model"),
        ("jaxcp.mesh", "jaxcp.context_parallel.api"),
        ("jaxcp.training.loop", "jaxcp.cli.main"),
        ("jaxcp.weights", "jaxcp"),
        ("jaxcp.models.gpt.model", "jaxcp.models.hybrid_moe.model"),
        ("jaxcp.context_parallel.ring", "jaxcp.context_parallel.all_gather"),
        ("jaxcp.training.loop", "configs.needle"),
        ("jaxcp.training.loop", "jaxcp.configs.needle"),
        ("jaxcp.configs.needle", "jaxcp.configs.gpt_cpu"),
        ("jaxcp.context_parallel.ring", "jaxcp.attention.cache"),
        ("jaxcp.context_parallel.ring", "flax.nnx"),
        ("jaxcp.attention.cache", "jaxcp.layers.attention"),
        ("jaxcp.layers.ngram", "jaxcp.data.windows"),
        ("jaxcp.inference.scheduler", "numpy"),
        ("jaxcp.inference.pages", "jaxcp.inference.steps"),
        ("jaxcp.models.base", "jaxcp.weights.files"),
        ("jaxcp.text.tokenizer", "jax.numpy"),
        ("pallas_kernels.dispatch", "flax"),
        ("pallas_kernels.dispatch", "jaxcp.mesh"),
        ("pallas_kernels.flash_attention.triton", "pallas_kernels.flash_attention.xla"),
    ],
)
def test_the_rule_catches(module, imported):
    strategies = {"jaxcp.context_parallel.ring", "jaxcp.context_parallel.all_gather"}
    assert list(violations(module, imported, strategies))


def test_every_room_has_a_place():
    rooms = {room_of(module) for module in MODULES if module.split(".")[0] in PACKAGES}
    assert rooms - {"jaxcp"} <= RANK.keys(), "put the new module into RANKS"
    assert len(strategy_modules()) >= 2
    assert HOST <= MODULES


def test_no_circles():
    """No module imports, by way of whatever others, itself."""
    arrows = {module_of(path): {*imports_of(path)} & MODULES for path in PRODUCT}
    done: set[str] = set()
    while ready := [m for m in arrows if m not in done and arrows[m] <= done | {m}]:
        done.update(ready)
    assert not arrows.keys() - done, f"circles among {sorted(arrows.keys() - done)}"


PUBLIC = {"_asdict", "_fields", "_make", "_replace"}
"""Methods of a NamedTuple: they begin so that no field can have their name."""


@functools.cache
def private_names_of_product():
    return {name for path in PRODUCT for name in re.findall(r"\b_[a-zA-Z]\w*", path.read_text())}


def private_names(path):
    """`(line, name)` of every private name of the product that a file imports, reads or patches."""
    own = {"self", "cls"}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in own:
            names = [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "").endswith("setattr"):
            patched = [x.value for x in node.args if isinstance(x, ast.Constant)]
            names = [part for x in patched if isinstance(x, str) for part in x.split(".")]
        for name in {*names} & private_names_of_product() - PUBLIC:
            yield node.lineno, name


def test_tests_reach_no_private_name():
    reached = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in SOURCES
        if path.is_relative_to(ROOT / "tests")
        for line, name in private_names(path)
    ]
    assert not reached, "\n".join(reached)


@pytest.mark.parametrize(
    "code",
    [
        "from jaxcp.inference.steps import _put",
        "steps._put(x)",
        "jaxcp.inference.steps._put",
        "engine.session()._tokens",
        'monkeypatch.setattr(steps, "_put", f)',
        'monkeypatch.setattr("jaxcp.inference.steps._put", f)',
    ],
)
def test_a_private_name_is_caught(tmp_path, code):
    file = tmp_path / "code.py"
    file.write_text(f"{code}\nself._own, x._replace(a=1), x.__dict__\n")
    assert [line for line, _ in private_names(file)] == [1]


def test_few_loose_files():
    loose = [path.stem for path in (ROOT / "jaxcp").glob("*.py")]
    assert len([name for name in loose if not name.startswith("__")]) <= 6, loose


def test_every_file_starts_with_its_license():
    found = [str(path) for path in SOURCES if not path.read_text().startswith(LICENSE)]
    assert not found, found


def test_no_drawers():
    names = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [str(path) for path in SOURCES if path.stem in names]


def test_files_stay_small():
    found = []
    for path in SOURCES:
        backend = backend_of(module_of(path))
        limit = 600 if backend in ("triton", "mosaic_tpu", "xla") else 400
        if path.is_relative_to(ROOT / "examples"):
            limit = 101
        lines = len(path.read_text().splitlines())
        if lines >= limit:
            found.append(f"{path.relative_to(ROOT)} has {lines} lines; under {limit}")
    assert not found, "\n".join(found)


def code_lines(function):
    """Lines of a function, without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_functions_stay_small():
    found = []
    for path in PRODUCT:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            kernel = backend_of(module_of(path)) and "kernel" in node.name
            limit = 160 if kernel else 60
            if code_lines(node) >= limit:
                name = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                found.append(f"{name} has {code_lines(node)} lines; under {limit}")
    assert not found, "\n".join(found)
