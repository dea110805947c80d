# SPDX-License-Identifier: Apache-2.0
"""The report on a model too large for this machine: what it expects, and of what it speaks."""

from benchmarks import family_memory, train_memory
from benchmarks.model_memory import GIB, MIB, compiled, must_send, unexpected
from pallas_kernels import devices


def row(layers, **changes):
    sizes = {
        "seconds": 1.0,
        "argument_bytes": layers * GIB,
        "temp_bytes": GIB,
        "total_bytes": (layers + 1) * GIB,
    }
    return {
        "target": "h200:8", "mesh": {"seq": 2, "model": 4}, "layers": layers, "program": "prefill",
        "context": 262_144, "new": 16_384, "piece": 16_384, "hbm_bytes": 80 * GIB,
        "collectives": {}, **sizes,
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
    halves = must_send(row(2, piece=8_192))
    assert 2 * halves["all-gather"] == sent["all-gather"], "of a piece, whatever the turn"


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
    assert "| prefill 16,384 | out of memory |" in compiled([refused])


def of_family(model, **changes):
    fixed = {"target": "v5p:4x4x4", "mesh": {"seq": 8, "model": 8}}
    return row(2, model=model, **fixed | changes)


def test_what_layers_of_other_families_must_send():
    """By hand, of 2,048 new tokens a device and 32,768 slots."""
    sent = family_memory.must_send(of_family("Llama-3.3-70B"))
    queries, answers = 16_384 * 8 * 128 * 2, 16_384 * 8 * 129 * 4
    assert sent == {"all-reduce": 2 * 2048 * 8192 * 2, "all-gather": queries, "all-to-all": answers}
    sent = family_memory.must_send(of_family("GLM-4.5"))
    assert sent["collective-permute"] == 2 * 7 * 32_768 * (256 * 2 + 4), "keys of one head are less"
    assert sent["all-to-all"] == 7 * 8 * 2560 * (2 * 5120 * 2 + 4)
    sent = family_memory.must_send(of_family("Kimi-Linear-48B-A3B"))
    pieces, channels = 16, 3 * 4 * 128
    assert sent["all-gather"] == pieces * (4 * 128 * 256 * 4 + 3 * channels * 2)
    assert sent["collective-permute"] == 7 * 32_768 * (576 * 2 + 4)
    assert sent["all-reduce"] == 6 * 2048 * 2304 * 2
    on_four = {"mesh": {"seq": 4, "model": 2}, "piece": 8_192}
    sent = family_memory.must_send(of_family("Qwen3.5-397B-A17B", **on_four))
    sums, inputs = 32 * 128 * 256 * 4, 3 * (2 * 16 + 64) * 128 // 2 * 2
    queries = 8_192 * 16 * 256 * 2
    assert sent["all-gather"] == 8 * (sums + inputs) + queries, "fewer bytes than keys of 65,536"
    assert "collective-permute" not in sent


def test_every_family_has_a_mesh_that_divides_its_heads():
    assert family_memory.mesh_for("Qwen3-Next-80B-A3B", "v5p:4x4x4") == {"seq": 32, "model": 2}
    assert family_memory.mesh_for("MiMo-V2-Flash", "rtx-pro-6000:8") == {"seq": 2, "model": 4}
    r = of_family("Kimi-K2", collectives={"all-gather": [1, 3 * MIB]}, program="decode", piece=1)
    assert "| Kimi-K2 | v5p:4x4x4 | seq=8 model=8 | 2 | decode 1 |" in family_memory.compiled([r])
    assert "| all-gather 3.0 MiB more |" in family_memory.compiled([r])


def test_a_step_at_best_is_the_longer_of_products_and_ring():
    """GPT-2 124M on eight v5p: 6 FLOPs a weight and token, 12 a channel and causal pair."""
    length, layers, width, vocab = 32_768, 12, 768, 50_304
    weights = 12 * layers * width**2 + vocab * width
    flops = (6 * weights * length + 12 * layers * width * length * (length + 1) / 2) / 8
    record = {
        "model": "GPT-2 124M", "target": "v5p:2x2x2", "mesh": {"seq": 8}, "tokens": length,
        "zero": 3, "remat": True, "optimizer": "AdamW",
    }  # fmt: skip
    chip = devices.V5P
    for sent in (0, 10 * chip.link_bytes_per_second):
        found = {"collective-permute": [1, sent]}
        line = train_memory.at_best([record | {"collectives": found}], {}).splitlines()[-1]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        products = flops * 4 / 3 / chip.bf16_flops
        step = max(products, 10.0 if sent else 0)
        assert cells[4] == f"{flops / 1e12:.1f} T" and cells[5] == f"{products:.3f}"
        assert cells[6:8] == ["10.000" if sent else "0.000", f"{step:.3f}"]
        assert cells[9] == ("0%" if sent else "75%")
