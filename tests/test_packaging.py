# SPDX-License-Identifier: Apache-2.0
"""What the metadata promises; `.ci/run` holds it against a wheel with the exact lower bounds."""

import ast
import importlib.util
import itertools
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from jaxcp.flax_version import FIRST_JAX_TOO_NEW, check

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PRODUCT = [path for name in ("jaxcp", "pallas_kernels") for path in (ROOT / name).rglob("*.py")]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PAIRS = {  # (flax, jax): whether jaxcp trains, saves, loads and answers with them; tried
    ("0.12.8", "0.10.2"): True,
    ("0.12.8", "0.11.0"): True,
    ("0.12.8", "0.11.1"): False,
    ("0.12.8", "0.11.2"): False,
    ("0.12.8", "0.12.0.1"): False,
    ("0.12.9", "0.11.1"): True,
    ("0.12.9", "0.11.2"): False,
    ("0.12.9", "0.12.0"): False,
    ("0.12.10", "0.11.1"): True,
    ("0.12.10", "0.11.2"): True,
    ("0.12.10", "0.12.0.1"): True,
    ("0.12.12", "0.11.2"): True,
    ("0.12.12", "0.12.0.1"): True,
}


def allowed(python, **versions):
    """Whether the metadata lets a Python have these versions."""
    requirements = map(Requirement, PROJECT["dependencies"])
    return all(
        requirement.specifier.contains(versions[requirement.name])
        for requirement in requirements
        if requirement.name in versions
        and (not requirement.marker or requirement.marker.evaluate({"python_version": python}))
    )


@pytest.mark.parametrize(("pair", "works"), PAIRS.items())
def test_no_pair_that_cannot_work_is_allowed_or_imported(pair, works):
    flax, jax = pair
    if works:
        check(flax, jax)
        return
    assert not any(allowed(python, flax=flax, jax=jax) for python in PYTHONS)
    with pytest.raises(ImportError, match=rf"flax {flax} cannot be imported beside jax {jax}"):
        check(flax, jax)


def test_both_ends_of_jax_are_allowed():
    assert allowed("3.11", flax="0.12.8", jax="0.10.2")
    for python, jax in itertools.product(PYTHONS[1:], ("0.11.1", "0.11.2", "0.12.0.1")):
        assert allowed(python, flax="0.12.12", jax=jax)


REFUSED = """
import importlib, importlib.metadata, sys
version = importlib.metadata.version
pair = {"flax": "0.12.8", "jax": "0.11.2"}
importlib.metadata.version = lambda name: pair.get(name) or version(name)
sys.modules["flax"] = None  # it must not be reached
import jaxcp.context_parallel, jaxcp.layout, jaxcp.mesh  # stand on jax alone
for module in sys.argv[1:]:
    for name in [name for name in sys.modules if name.startswith("jaxcp")]:
        del sys.modules[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        assert "flax 0.12.8 cannot be imported beside jax 0.11.2" in str(error), (module, error)
    else:
        raise AssertionError(f"{module} was imported")
"""


def test_every_module_that_needs_flax_refuses_one_that_cannot_work():
    using = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in PRODUCT
        if "flax" in roots_imported(path)
    ]
    assert len(using) > 20 and FIRST_JAX_TOO_NEW
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, *using], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def roots_imported(path):
    """The first names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0]


def test_what_is_imported_is_declared():
    imported = {root for path in PRODUCT for root in roots_imported(path)}
    foreign = imported - {*sys.stdlib_module_names, "jaxcp", "pallas_kernels"}
    declared = {Requirement(line).name for line in PROJECT["dependencies"]}
    names = {"orbax": "orbax-checkpoint", "jaxlib": "jax"}
    missing = {root for root in foreign if names.get(root, root) not in declared}
    extras = {
        Requirement(line).name.replace("-", "_")
        for extra in ("pictures", "serve")
        for line in PROJECT["optional-dependencies"][extra]
    }
    assert missing == extras - {"jaxcp"}


def test_pictures_are_drawn_in_one_place():
    drawing = [path.name for path in PRODUCT if "matplotlib" in roots_imported(path)]
    assert drawing == ["pictures.py"]


def lower_bounds():
    spec = importlib.util.spec_from_file_location("lower_bounds", ROOT / ".ci" / "lower_bounds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lower_bounds_are_those_of_the_project():
    """Every dependency has one, and it is the lowest version that its own line allows."""
    for line in (
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["pictures"],
    ):
        declared = Requirement(line)
        pinned = Requirement(lower_bounds().lower_bound(line))
        (exact,) = pinned.specifier
        assert (pinned.name, exact.operator, pinned.marker) == (
            declared.name,
            "==",
            declared.marker,
        )
        assert f">={exact.version}" in str(declared.specifier).split(",")
    printed = lower_bounds().constraints(["pictures"])
    assert len(printed) == len(PROJECT["dependencies"]) + 1
    for line in ("jax", "jax<0.13", "jax~=0.12"):
        with pytest.raises(SystemExit, match="needed one lower bound"):
            lower_bounds().lower_bound(line)


def test_a_run_is_found_by_name_here_first_then_among_those_that_ship(tmp_path, monkeypatch):
    from jaxcp.training import load_run

    monkeypatch.chdir(tmp_path)
    assert load_run("gpt_cpu").steps == 800
    (tmp_path / "configs").mkdir()
    shipped = (ROOT / "jaxcp" / "configs" / "gpt_cpu.py").read_text()
    (tmp_path / "configs" / "gpt_cpu.py").write_text(shipped.replace("steps=800", "steps=7"))
    assert load_run("gpt_cpu").steps == 7 and load_run("needle").steps == 2_200
    with pytest.raises(
        ValueError, match=r"one of \['gpt2_124m', 'gpt_cpu', 'needle', 'shakespeare_char'"
    ):
        load_run("gpt9")


def test_a_picture_without_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    from jaxcp.evaluate.needle import Result, plot_heat_map
    from jaxcp.evaluate.pictures import draw_if_possible, new_figure

    assert draw_if_possible(lambda data, path: path.write_text(data), "x", tmp_path / "a") == str(
        tmp_path / "a"
    )
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = draw_if_possible(plot_heat_map, Result(answers=(), reads=()), tmp_path / "b.png")
    assert "pip install matplotlib" in said and not (tmp_path / "b.png").exists()
    with pytest.raises(ImportError, match="a picture needs matplotlib: pip install"):
        new_figure()
