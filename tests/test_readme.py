# SPDX-License-Identifier: Apache-2.0
"""What README shows is run, in order, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(*languages):
    return [code for language, code in BLOCK.findall(README.read_text()) if language in languages]


@pytest.mark.slow
def test_python_blocks_run(tmp_path):
    code = blocks("python")
    assert code, "README shows no Python"
    script = tmp_path / "readme.py"
    script.write_text("\n".join(code))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.splitlines()[0] == "902714"


def shell_commands():
    for block in blocks("bash", "sh", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split("#")[0].removeprefix("$ ").strip()
            if command:
                yield command


def test_shell_blocks_name_what_is_there():
    """Each command is a make target, an extra, a file or a subcommand with flags that exist."""
    commands = list(shell_commands())
    assert any(command.startswith("make ") for command in commands), "README shows no make"
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    for command in commands:
        words = command.split()
        if words[0] == "make":
            for target in (word for word in words[1:] if "=" not in word):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), command
        elif words[0] == "pip":
            for extra in re.findall(r"\[(\w+)\]", command):
                assert re.search(rf"^{extra} = \[", project, re.MULTILINE), command
        elif words[0] == "python":
            if words[1] != "-m":
                assert ROOT.joinpath(words[1]).exists(), command
        elif words[0] == "jaxcp":
            check_flags(words)


def check_flags(words):
    path = [word for word in words[1:] if re.fullmatch(r"[a-z]+", word)][:2]
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    # the longest run of leading words that is a subcommand: `eval needle`, `generate`
    for length in range(len(path), -1, -1):
        called = [sys.executable, "-m", "jaxcp.cli.main", *path[:length], "--help"]
        shown = subprocess.run(called, cwd=ROOT, capture_output=True, text=True, timeout=60)
        if shown.returncode == 0:
            break
    assert length > 0, f"{' '.join(words)}: no such subcommand"
    missing = [flag for flag in flags if flag not in shown.stdout]
    assert not missing, f"{' '.join(words)}: no flags {missing}"
