# SPDX-License-Identifier: Apache-2.0
"""Compiled programs stay in the run's folder; what is damaged there is compiled again."""

import jax
import jax.numpy as jnp
import pytest

from jaxcp.training.programs import Programs

OPTION = "jax_compilation_cache_dir"


def compile_one(folder):
    """Compile a program as a new process would; give the folder's entries before and after."""
    jax.clear_caches()
    programs = Programs(folder)
    with programs.kept():
        assert getattr(jax.config, OPTION) == str(folder)
        at_start = sizes(folder)
        jax.jit(lambda x: jnp.cos(x) * 3)(jnp.arange(7.0))
        programs.note()
    return at_start, sizes(folder)


def sizes(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "files.json"]
    return {path.name: path.stat().st_size for path in files if "atime" not in path.name}


def test_programs_are_found_again_and_the_option_is_put_back(tmp_path):
    assert getattr(jax.config, OPTION) is None
    start, compiled = compile_one(tmp_path / "cache")
    assert not start and compiled and all(compiled.values())
    again = compile_one(tmp_path / "cache")
    assert again == (compiled, compiled)
    assert getattr(jax.config, OPTION) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "unlisted"])
def test_a_damaged_program_is_compiled_again(tmp_path, damage):
    folder = tmp_path / "cache"
    _, compiled = compile_one(folder)
    name = max(compiled, key=compiled.__getitem__)
    raw = bytearray((folder / name).read_bytes())
    if damage == "cut":
        (folder / name).write_bytes(raw[:100])
    elif damage == "flipped":
        raw[len(raw) // 2] ^= 4
        (folder / name).write_bytes(raw)
    else:
        (folder / "files.json").unlink()
    start, after = compile_one(folder)
    assert name not in start and after.keys() == compiled.keys()
    # an entry says how long its compilation took
    assert after[name] == pytest.approx(compiled[name], abs=20)


def test_a_process_that_has_a_cache_keeps_it(tmp_path):
    jax.config.update(OPTION, str(tmp_path / "theirs"))
    try:
        programs = Programs(tmp_path / "ours")
        with programs.kept():
            assert getattr(jax.config, OPTION) == str(tmp_path / "theirs")
        programs.note()
    finally:
        jax.config.update(OPTION, None)
    assert not (tmp_path / "ours").exists()
    with Programs(None).kept():
        assert getattr(jax.config, OPTION) is None
