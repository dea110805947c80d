# SPDX-License-Identifier: Apache-2.0
"""Token files of others, built by hand from the description of each format."""

import struct

import numpy as np
import pytest

from jaxcp.data.sources import TokenFiles
from jaxcp.data.token_formats import header, open_tokens

IDS = np.arange(1000, 1040)


def llm_c(path, magic, version, dtype, count=None):
    numbers = np.zeros(256, "<i4")
    numbers[:3] = magic, version, IDS.size if count is None else count
    path.write_bytes(numbers.tobytes() + IDS.astype(dtype).tobytes())


def megatron(path, code, dtype, lengths=(25, 15), documents=(0, 1, 2), version=1, gap=0):
    path.write_bytes(IDS.astype(dtype).tobytes())
    pointers = np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize
    pointers[1:] += gap
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", version, code, len(lengths), len(documents))
        + np.array(lengths, "<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.array(documents, "<i8").tobytes()
    )


WRITTEN = {
    "nanoGPT": lambda path: path.write_bytes(IDS.astype("<u2").tobytes()),
    "llm.c": lambda path: llm_c(path, 20240520, 1, "<u2"),
    "llm.c, Llama 3": lambda path: llm_c(path, 20240801, 7, "<u4"),
    "Megatron, uint16": lambda path: megatron(path, 8, "<u2"),
    "Megatron, int32": lambda path: megatron(path, 4, "<i4"),
    "ours": lambda path: path.write_bytes(header(IDS.size, 4) + IDS.astype("<u4").tobytes()),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_file_is_read_by_what_it_says_of_itself(tmp_path, kind):
    path = tmp_path / "x.bin"
    WRITTEN[kind](path)
    np.testing.assert_array_equal(open_tokens(path), IDS)
    source = TokenFiles(pattern=str(path))
    token = source.batch(0, 1, 39)["tokens"][0, 5]
    said = source.locate(0, 1, 39, 0, 5)
    offset, dtype = said.split("(byte ")[1].rstrip(")").split(", ")
    data = path.read_bytes()[int(offset) :]
    assert np.frombuffer(data, dtype, 1)[0] == token


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("more", [-1, -2, -4, 4])
def test_a_count_that_disagrees_with_the_size_is_refused(tmp_path, kind, more):
    path = tmp_path / "x.bin"
    WRITTEN[kind](path)
    data = path.read_bytes()
    path.write_bytes(data[:more] if more < 0 else data + bytes(more))
    if kind == "nanoGPT" and more != -1:  # nothing in the file says how many there are
        assert open_tokens(path).size == (len(data) + more) // 2
        return
    with pytest.raises(ValueError, match=r"says 40 tokens|no multiple of 2"):
        open_tokens(path)


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda path: llm_c(path, 20240520, 2, "<u2"), "needed version 1 after 20240520"),
        (lambda path: llm_c(path, 20240801, 1, "<u4"), "needed version 7 after 20240801"),
        (lambda path: llm_c(path, 20240520, 1, "<u2", count=-5), "with -5 tokens"),
        (lambda path: path.write_bytes(struct.pack("<3i", 20240520, 1, 4)), "within its header"),
        (lambda path: path.write_bytes(header(1, 2)[:20]), "within its header"),
        (lambda path: path.write_bytes(header(1, 3) + bytes(3)), "tokens of 1, 2 or 4 bytes"),
        (lambda path: path.write_bytes(header(0, 2)), "holds no token"),
        (lambda path: megatron(path, 7, "<f4"), "dtype of integers"),
        (lambda path: megatron(path, 8, "<u2", version=2), "version 2"),
        (lambda path: megatron(path, 8, "<u2", gap=2), "one after the other"),
        (lambda path: megatron(path, 8, "<u2", lengths=(25, 14)), "says 39 tokens"),
        (lambda path: path.with_suffix(".idx").write_bytes(b"") or path.write_bytes(b"ab"), "none"),
    ],
)
def test_a_header_that_cannot_be(tmp_path, write, match):
    write(tmp_path / "x.bin")
    with pytest.raises(ValueError, match=match):
        open_tokens(tmp_path / "x.bin")


def test_an_index_that_is_cut_off_or_handed_over_itself(tmp_path):
    path = tmp_path / "x.bin"
    megatron(path, 8, "<u2")
    with pytest.raises(ValueError, match=r"index of Megatron's; name the \.bin"):
        open_tokens(path.with_suffix(".idx"))
    index = path.with_suffix(".idx")
    data = index.read_bytes()
    index.write_bytes(data + bytes(2))  # modes of multimodal data, one a sequence
    assert open_tokens(path).size == 40
    index.write_bytes(data[:-3])
    with pytest.raises(ValueError, match="2 sequences and 3 documents"):
        open_tokens(path)


@pytest.mark.parametrize(
    ("name", "match"),
    [("x.jsonl", "is JSON: `jaxcp prepare`"), ("x.txt", "is text"), ("meta.pkl", "no token file")],
)
def test_what_is_no_token_file_is_refused_by_name(tmp_path, name, match):
    (tmp_path / name).write_bytes(b'{"text": "abcd"}')
    with pytest.raises(ValueError, match=match):
        TokenFiles(pattern=str(tmp_path / name)).batch(0, 1, 2)


def test_a_separator_that_starts_documents_is_what_their_last_token_predicts(tmp_path):
    np.array([0, 5, 6, 0, 7, 8, 9], "<u2").tofile(tmp_path / "x.bin")
    source = TokenFiles(pattern=str(tmp_path / "x.bin"), separator=0, separator_at="starts")
    batch = source.part_of_all(0, 1, 6)
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 2]]
    assert batch["targets"].tolist() == [[5, 6, 0, 7, 8, 9]]
    seen = TokenFiles(pattern=str(tmp_path / "x.bin"), separator=0, isolate=False)
    assert "segment_ids" not in seen.batch(0, 1, 6)


def test_all_rows_hold_every_token_once(tmp_path):
    for name, ids in (("a", IDS[:17]), ("b", IDS[17:])):
        ids.astype("<u2").tofile(tmp_path / f"{name}.bin")
    source = TokenFiles(pattern=str(tmp_path / "*.bin"))
    assert source.rows_of_all(8) == 5  # 39 targets
    batches = [source.part_of_all(first, 2, 8) for first in (0, 2, 4)]
    targets = np.concatenate([batch["targets"] for batch in batches]).ravel()
    np.testing.assert_array_equal(targets[targets >= 0], IDS[1:])
    tokens = np.concatenate([batch["tokens"] for batch in batches]).ravel()
    np.testing.assert_array_equal(tokens[targets >= 0], IDS[:-1])
