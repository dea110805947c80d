# SPDX-License-Identifier: Apache-2.0
"""What docs/training.md shows is run, in order, as a reader would, with fewer steps."""

import gzip
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcp.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "training.md"
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
FEWER = {
    "steps=2000": "steps=4",
    "warmup_steps=100": "warmup_steps=2",
    "eval_every=250": "eval_every=99",
    "samples.every=500": "samples.every=3 samples.tokens=2",
    "--profile 100:5": "--profile 2:2",
    "--cool-down 200": "--cool-down 2",
    "--extend 3000": "--extend 6",
    "context=((1000, 64),)": "context=((2, 64),)",
    "batch_size=12": "batch_size=60",
    "num_layers=4": "num_layers=1",
    "embed_dim=128": "embed_dim=16",
}
"""Numbers of the page, and those of the test; each is there."""


def shown():
    """Blocks of the page as `(language, code)`, with fewer steps."""
    text = PAGE.read_text()
    for shown, less in FEWER.items():
        assert shown in text, shown
        text = text.replace(shown, less)
    return BLOCK.findall(text)


def commands(code):
    whole = code.replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in whole.splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_every_command_is_one_of_jaxcp():
    found = [words for language, code in shown() if language == "sh" for words in commands(code)]
    assert len(found) > 8 and {words[0] for words in found} == {"jaxcp"}


@pytest.mark.slow
def test_the_page_is_run_in_order(tmp_path, monkeypatch, capsys):
    """And what transformers writes, with the checkpoint and its tokenizer, is what jaxcp writes."""
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    monkeypatch.chdir(tmp_path)
    said = []
    for language, code in shown():
        if language == "sh":
            if "--coordinator" in code:
                run_together(commands(code))
                continue
            for words in commands(code):
                run(words[1:])
        elif code.startswith("# shakespeare.py"):
            (tmp_path / code.split()[1]).write_text(code)
        else:
            exec(code, {})
        said.append(capsys.readouterr().out)
    assert "1,003,854 tokens to train" in said[0] and "Fields of shakespeare.py" in said[2]
    assert said[-1].rstrip("\n") == "ROMEO:" + said[-2].rstrip("\n")
    runs = {path.name: path for path in (tmp_path / "runs").iterdir()}
    four = dict.fromkeys(("faster", "tuned", "longer", "sharded", "two"), 4)
    ends = four | {"shakespeare": 6, "cooled": 6}
    assert runs.keys() == {*ends, "flat"}
    for name, steps in ends.items():
        assert (runs[name] / "model" / "tokenizer.json").is_file()
        records = [json.loads(x) for x in (runs[name] / "metrics.jsonl").read_text().splitlines()]
        assert records[-1]["step"] == steps and records[-1]["eval_tokens"] == 111_539
    check_reports(runs["faster"])


def check_reports(folder):
    """The samples, the events and the trace that a run was asked for."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "sample" in r] == [3, 4]
    assert len([*folder.glob("events.out.tfevents.*")]) == 1
    [trace] = (folder / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "train" and "args" in e}
    assert steps == {"2", "3"}


def run_together(every):
    """Run commands beside each other, in processes of their own, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = []
    for words in every:
        assert "localhost:9911" in words
        own = [address if word == "localhost:9911" else word for word in words[1:] if word != "&"]
        started.append(subprocess.Popen([sys.executable, "-m", "jaxcp", *own], env=env))
    assert [process.wait(300) for process in started] == [0, 0]


def run(words):
    """Run a command in this process; `--help` ends as one does."""
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code in (None, 0), words
