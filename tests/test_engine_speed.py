# SPDX-License-Identifier: Apache-2.0
"""The engine beside transformers, and drafts beside none: all of it once, on a few tokens."""

import pytest

from benchmarks import drafts, engine_speed
from benchmarks.engine_speed import Args, Speed


def test_ratios_are_those_of_the_same_work():
    args = Args(context=1000, rows=(1, 3), new_tokens=11)
    one, other = (
        {n: Speed(prefill=n * x, decode=2 * n * x, answers=[]) for n in (1, 3)} for x in (1, 4)
    )
    found = list(engine_speed.lines(args, {"jaxcp": one, "transformers": other}))
    assert found[0] == ("1", "jaxcp", "1,000", "", "5.0", "")
    assert found[1] == ("1", "transformers", "250", "4.00", "1.2", "4.00")
    assert found[2] == ("3", "jaxcp", "333", "", "5.0", "")  # 3 prompts of 333 tokens


@pytest.mark.slow
def test_a_few_tokens_from_beginning_to_end(tmp_path, capsys):
    engine_speed.main(Args(out=tmp_path, context=64, rows=(1, 2), new_tokens=4))
    text = (tmp_path / "engine_speed.md").read_text()
    assert text.count("| jaxcp |") == 2 and "Qwen3-MoE" in text
    assert "transformers was not measured" in capsys.readouterr().out or "| transformers |" in text


@pytest.mark.slow
def test_drafts_of_which_all_or_none_are_right(tmp_path):
    drafts.main(drafts.Args(out=tmp_path, layers=2, prompt=16, new_tokens=24, rows=(2,), repeats=1))
    none, every = (tmp_path / "drafts.md").read_text().splitlines()[-2:]
    assert none.startswith("| none right | 2 |") and none.endswith("| 1.00 |")
    assert every.startswith("| all right | 2 |") and float(every.split("|")[-2]) > 2
