# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `python -m benchmarks.inference`, and all of it once, on a few tokens."""

import itertools
import re

import numpy as np
import pytest
from flax import nnx

import jaxcp
from benchmarks import decode, inference, ladder, long_agent
from jaxcp.text.tokenizer import byte_level


def rung(name, seconds, answers=((1, 2), (3,))):
    return ladder.Rung(
        name=name, seconds=seconds, tokens=100, computed=300, bytes=2**20,
        answers=[list(x) for x in answers],
    )  # fmt: skip


def test_shares_of_the_rungs_are_those_of_the_whole_climb():
    rungs = (
        rung("anew", 80.0),
        rung("kept", 10.0),
        rung("slower", 20.0),
        rung("int8", 5.0, ((9,), (3,))),
    )
    lines = list(ladder.rows(rungs))
    assert [line[5] for line in lines] == ["1.00", "8.00", "0.50", "4.00"]
    assert [line[6] for line in lines] == ["1.00", "8.00", "4.00", "16.00"]
    assert [line[7] for line in lines] == ["0 %", "75 %", "-25 %", "50 %"]
    assert [line[8] for line in lines] == ["all", "all", "all", "1 of 2"]
    assert lines[1][:5] == ("kept", "10.00", "10", "300", "1.00")


def test_agents_share_their_beginning_and_nothing_else():
    agents = ladder.Agents(agents=2, turns=3, system=50, output=20, new_tokens=4)
    one, two = agents.said()
    assert len(agents.system_prompt()) == 50 and len(one) == len(two) == 3 and one != two
    longest = max(sum(map(len, outputs)) for outputs in (one, two))
    assert agents.longest == 50 + longest + 3 * 4


def test_a_fit_finds_what_steps_are_made_of():
    def step(rows, context):
        padded = min(size for size in (1, 4, 16) if size >= rows)
        seconds = 2e-3 + 1e-4 * padded + 3e-8 * rows * context
        return decode.Step(rows=rows, padded=padded, context=context, seconds=seconds)

    measured = [step(*x) for x in itertools.product((1, 2, 4, 8, 16), (1_000, 8_000, 64_000))]
    found = decode.fit(measured)
    assert (found.fixed, found.row, found.token) == pytest.approx((2e-3, 1e-4, 3e-8))
    assert found.worst < 1e-9
    assert str(found) == (
        "2.00 ms + 0.100 ms a padded row + 30.0 µs a row and 1,000 tokens of its context, "
        "within 0 %"
    )
    assert next(iter(decode.step_rows(measured)))[0] == "1,000"


def test_the_slope_is_that_of_later_turns():
    host = [10**6 * (turn < 5) + 300 * turn for turn in range(20)]
    long = long_agent.Long(tokens=1, same={}, device=[2**20] * 20, host=host)
    assert long.slope == pytest.approx(300)
    assert next(iter(long_agent.rows(long))) == ("arrays on devices", "1.000", "1.000", "1.000")


def test_what_calls_take_is_added_up():
    class Owner:
        def work(self, x):
            return 2 * x

    owner, seconds = Owner(), {}
    with decode.clocked(seconds, "work", owner, "work"):
        assert [owner.work(x) for x in range(3)] == [0, 2, 4]
    spent = seconds["work"]
    assert spent > 0 and owner.work(5) == 10 and seconds["work"] == spent


def test_a_climb_that_leads_nowhere_has_no_shares():
    assert [line[7] for line in ladder.rows([rung("anew", 1.0), rung("kept", 1.02)])] == ["", ""]


@pytest.mark.slow
def test_all_of_it_on_a_few_tokens(tmp_path, monkeypatch):
    """The numbers that are no seconds: what is computed anew and kept, and that texts are alike."""
    config = jaxcp.GPTConfig(
        vocab_size=256, max_positions=512, num_layers=1, num_heads=2, embed_dim=16
    )
    jaxcp.save(jaxcp.GPT(config, rngs=nnx.Rngs(0)), tmp_path / "model", byte_level())
    monkeypatch.setattr(inference, "NEEDLE", tmp_path / "model")
    inference.main(
        inference.Args(
            out=tmp_path, seq=2, requests=3, new_tokens=4, turns=3, output=40, agents=3,
            system=100, drafts=3, rows=(1, 2), contexts=(128, 256), steps=3, host=2, long=5,
            checked=(1, 3),
        )
    )  # fmt: skip
    text = (tmp_path / "inference.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = {line[0]: line[1:] for line in lines}
    agents = ladder.Agents(agents=3, turns=3, system=100, output=40, new_tokens=4)
    new = np.array([[len(outputs) for outputs in said] for said in agents.said()])
    ends = 100 + np.cumsum(new + 4, axis=1)  # tokens after each turn
    # the last token of an answer joins with the next turn, so it is not computed here
    anew = (ends[0] - 1).sum()
    kept = ends[0, -1] - 1
    together = (ends[:, -1] - 1).mean()
    computed = {
        name: int(line[2].replace(",", "")) for name, line in cells.items() if len(line) == 8
    }
    assert computed["prefill anew each turn"] == anew and computed["cache kept"] == kept
    assert computed["beginning shared by 3, one by one"] < together
    assert [cells[x][-1] for x in ("cache kept", "3 in a batch", "3 guesses")] == ["all"] * 3
    assert float(cells["int8 cache"][3]) < float(cells["3 guesses"][3])
    assert "the answer of turn 1 the same, 3 the same, 5 the same" in text
    first, middle, last = cells["arrays on devices"]
    assert first == middle == last
    assert re.search(r"The host gains -?[\d,]+ bytes a turn", text)
