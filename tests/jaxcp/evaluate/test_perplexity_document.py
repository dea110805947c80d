# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/inference.md are run, on fewer tokens."""

import json
import re
import shlex
from pathlib import Path

import pytest

from jaxcp.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
FEWER = {
    "20000": "40",
    "512": "16",
    "2048": "32",
    "256": "24",
    "64": "12",
    "--json": "--json --max-tokens 40",
}


@pytest.mark.slow
def test_every_command_is_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = "".join(re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)).splitlines()
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(" ".join(FEWER.get(word, word) for word in shlex.split(line)))
        assert words[:3] == ["jaxcp", "eval", "perplexity"]
        main(words[1:])
    out = capsys.readouterr().out
    assert "context 32: a token was predicted from" in out
    assert json.loads(out.splitlines()[-1])["results"][0]["tokens"] == 40
