# SPDX-License-Identifier: Apache-2.0
"""The report on a model too large for this machine: what it expects, and of what it speaks."""

from benchmarks.model_memory import GIB, MIB, compiled, must_send, unexpected


def row(layers, **changes):
    sizes = {
        "seconds": 1.0,
        "argument_bytes": layers * GIB,
        "temp_bytes": GIB,
        "total_bytes": (layers + 1) * GIB,
    }
    return {
        "target": "h200:8", "mesh": {"seq": 2, "model": 4}, "layers": layers, "program": "prefill",
        "context": 262_144, "new": 16_384, "hbm_bytes": 80 * GIB, "collectives": {}, **sizes,
    } | changes  # fmt: skip


def test_what_two_layers_must_send():
    """Queries of 16 heads; their outputs and lse in float32; the stream in bfloat16 four times and
    in float32 once; experts in two rounds of 81,920 rows."""
    sent = must_send(row(2))
    assert sent["all-gather"] == 2 * 16_384 * 16 * 128 * 2
    assert sent["all-reduce"] == 8_192 * 4096 * (4 * 2 + 4)
    answers, rows = 2 * 16_384 * 16 * 129 * 4, 2 * 81_920
    assert sent["all-to-all"] == answers + rows * (2 * 4096 * 2 + 4)
    assert must_send(row(2, mesh={"seq": 1, "model": 8})).keys() == {"all-reduce"}
    assert must_send(row(2, new=262_144)) is None


def test_what_is_unexpected():
    sent = {kind: [1, size] for kind, size in must_send(row(2)).items()}
    assert unexpected(row(2, collectives=sent)) == "none"
    more = sent | {"all-gather": [2, sent["all-gather"][1] + 9 * MIB], "collective-permute": [1, 0]}
    found = unexpected(row(2, collectives=more))
    assert found == "all-gather 9.0 MiB more, collective-permute 0.0 MiB more"
    assert unexpected(row(2, collectives=None)) == "not compared"


def test_the_table_says_whether_it_fits():
    assert "| 101% | **-1.0: does not fit** |" in compiled([row(80)])
    assert "| 90% | 9.0 |" in compiled([row(80, hbm_bytes=90 * GIB)])
    refused = row(80) | {"refused": "out of memory"}
    assert "| prefill | out of memory |" in compiled([refused])
