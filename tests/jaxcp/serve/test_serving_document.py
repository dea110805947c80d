# SPDX-License-Identifier: Apache-2.0
"""docs/serving.md: every command of it is run, and examples/serve_and_ask.py."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from tiny_chat import write_tiny_chat

from jaxcp.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


FEWER = {
    "--requests": "2", "--rate": "1000", "--turns": "2", "--prompt-tokens": "9",
    "--answer-tokens": "3", "--shared-tokens": "9",
}  # fmt: skip
"""Numbers of a load, in place of those of the document."""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands(program):
    """The words of each command of the document that runs `program`."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [words for words in map(shlex.split, lines) if words[0] == program]
    assert found, f"no {program} in docs/serving.md"
    return found


def test_all_commands_are_known_ones():
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    assert {shlex.split(line)[0] for line in lines} == {"jaxcp", "curl"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_command_of_the_document(tmp_path):
    """Each server that it starts, and on it all that it asks; then it ends at once, with 0."""
    write_tiny_chat(tmp_path / "my-model")
    (tmp_path / "keys.txt").write_text("secret\n")
    for words in (words for words in commands("jaxcp") if words[1] == "serve"):
        own = [sys.executable, "-m", "jaxcp.cli.main", *words[1:], "--port", "0", "--no-warm-up"]
        own += ["--grace-seconds", "600"]  # none of which it takes
        process = subprocess.Popen(
            own, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        try:
            line = process.stdout.readline()
            port = re.search(r"at http://[\d.]+:(\d+)$", line.strip())
            assert port, line + process.stderr.read()
            ask(words, port.group(1), tmp_path)
            health = httpx2.get(f"http://127.0.0.1:{port.group(1)}/health", trust_env=False)
            assert health.json()["status"] == "ok"
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=120)
            assert process.returncode == 0, log
        finally:
            process.kill()
            process.communicate()


def ask(words, port, folder):
    """Run what the document asks of the server that `words` started."""
    keys = "--api-keys" in words
    for asked in commands("curl"):
        if keys == any("Bearer" in word for word in asked):
            address = [word.replace(":8000", f":{port}") for word in asked]
            done = subprocess.run([*address, "-f"], capture_output=True, text=True, timeout=120)
            assert done.returncode == 0 and done.stdout, (asked, done.stderr)
            if asked[-1].startswith("{") and "stream" not in asked[-1]:
                assert json.loads(done.stdout)["choices"]
    if not keys:
        [code] = blocks("python")
        program = folder / "ask.py"
        program.write_text(code.replace(":8000", f":{port}"))
        done = subprocess.run(
            [sys.executable, program], capture_output=True, text=True, timeout=120, env=ENVIRONMENT
        )
        assert done.returncode == 0 and done.stdout.endswith("tokens were known\n"), done.stderr


@pytest.mark.slow
def test_every_load_of_the_document(server, tmp_path, monkeypatch, capsys):
    """They are small here, on a server that runs."""
    monkeypatch.chdir(tmp_path)
    for words in (words for words in commands("jaxcp") if words[1:3] == ["eval", "load"]):
        asked = [word.replace("http://127.0.0.1:8000", server.url) for word in words[1:]]
        for name in FEWER.keys() & {*asked}:
            asked[asked.index(name) + 1] = FEWER[name]
        for name in {"--prompt-tokens", "--answer-tokens"} - {*asked}:
            asked += [name, FEWER[name]]
        main(asked)
        turns = 2 if "--turns" in asked else 1
        assert f"{2 * turns} of {2 * turns} requests" in capsys.readouterr().out
    assert Path("load.png").exists() and len(json.loads(Path("load.json").read_text())["each"]) == 4


@pytest.mark.slow
def test_the_example_on_the_shipped_checkpoint():
    done = subprocess.run(
        [sys.executable, ROOT / "examples/serve_and_ask.py", "--seq", "1"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "answer: 902714\nthe server ended with 0\n" in done.stdout


@pytest.mark.slow
def test_the_example_on_a_chat_model(tmp_path):
    folder = write_tiny_chat(tmp_path / "chat")
    program = [sys.executable, ROOT / "examples/serve_and_ask.py", "--checkpoint", folder]
    done = subprocess.run(
        [*program, "--seq", "1", "--max-tokens", "8"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "answer: " in done.stdout and done.stdout.endswith("the server ended with 0\n")
