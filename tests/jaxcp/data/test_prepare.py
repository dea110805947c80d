# SPDX-License-Identifier: Apache-2.0
"""From files that people have to a folder of tokens: nanoGPT's bytes, and nothing half done."""

import gzip
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from jaxcp.data.prepare import has_many, prepare, symbols
from jaxcp.data.prepared import read_prepared
from jaxcp.data.sources import SHAKESPEARE, TextSource, TokenFiles, as_source
from jaxcp.data.token_formats import open_tokens
from jaxcp.text.encoders import byte_encoder, char_encoder, file_encoder, usual_separator
from jaxcp.text.tokenizer import Tokenizer

TEXTS = [f"Document {i}: grün, 東京, <|endoftext|>." for i in range(200)]


def json_lines(path, field="text"):
    path.write_text(
        "".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    )
    return str(path)


def tokens_of(folder, part):
    return np.concatenate(TokenFiles(pattern=str(folder), part=part).pieces)


def documents_of(folder, encoder):
    """The texts of both parts, cut at the separators."""
    out = []
    for part in ("train", "val"):
        ids = tokens_of(folder, part)
        places = np.flatnonzero(ids == encoder.separator)
        pieces = np.split(ids, places + 1)
        assert pieces.pop().size == 0
        out += [encoder.tokenizer.decode(piece[:-1]) for piece in pieces]
    return out


def test_shakespeare_becomes_what_nanogpt_makes_of_it(tmp_path):
    """The sums of train.bin and val.bin that nanoGPT's own prepare.py writes."""
    prepare([SHAKESPEARE], tmp_path / "out", encoder=char_encoder(symbols([SHAKESPEARE])))
    sums = {
        part: hashlib.sha256(tokens_of(tmp_path / "out", part).astype("<u2").tobytes()).hexdigest()
        for part in ("train", "val")
    }
    assert sums == {
        "train": "6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f",
        "val": "d37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1",
    }
    source = TextSource(path=SHAKESPEARE, alphabet="characters", part=(0.9, 1.0))
    np.testing.assert_array_equal(source.tokens, tokens_of(tmp_path / "out", "val"))
    tokenizer = Tokenizer.from_file(tmp_path / "out" / "tokenizer.json")
    text = "First Citizen:\nBefore we proceed"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    np.testing.assert_array_equal(tokenizer.encode(source.text[:500].decode()),
                                  tokens_of(tmp_path / "out", "train")[:500])  # fmt: skip


def gzipped(path):
    path.with_suffix(".jsonl.gz").write_bytes(
        gzip.compress(pathlib.Path(json_lines(path)).read_bytes())
    )
    return str(path.with_suffix(".jsonl.gz"))


def parquet(path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": range(200), "text": TEXTS}), path, row_group_size=7)
    return str(path)


@pytest.mark.parametrize(
    "write", [json_lines, gzipped, parquet], ids=["JSON lines", "gzipped", "Parquet"]
)
@pytest.mark.parametrize("by", ["byte", "char"])
def test_records_come_back_as_they_were(tmp_path, write, by):
    file = write(tmp_path / ("x.parquet" if write is parquet else "x.jsonl"))
    end = {"separator": "<|endoftext|>"}
    encoder = byte_encoder(**end) if by == "byte" else char_encoder(symbols([file]), **end)
    read = []
    prepared = prepare(
        [file], tmp_path / "out", encoder=encoder, val=0.2, shard_tokens=1000, on_read=read.append
    )
    assert sorted(documents_of(tmp_path / "out", encoder)) == sorted(TEXTS)
    assert prepared == read_prepared(tmp_path / "out") and prepared.documents == 200
    assert {shard.tokens for shard in prepared.train[:-1]} == {1000} and len(prepared.train) > 3
    assert 15 < sum(tokens_of(tmp_path / "out", "val") == encoder.separator) < 70
    assert read == sorted(read) and read[-1] == pathlib.Path(file).stat().st_size
    assert has_many([file])


def test_the_same_text_is_in_one_part_whatever_the_files(tmp_path):
    encoder = byte_encoder(separator="<|endoftext|>")
    one, other = json_lines(tmp_path / "a.jsonl"), json_lines(tmp_path / "b.jsonl")
    prepare([one, other], tmp_path / "out", encoder=encoder, val=0.3)
    halves = [
        {bytes(x) for x in np.split(ids, np.flatnonzero(ids == encoder.separator) + 1)} - {b""}
        for ids in (tokens_of(tmp_path / "out", part).astype("u1") for part in ("train", "val"))
    ]
    assert not halves[0] & halves[1]


def test_a_text_is_cut_between_characters_and_separators_start_documents(tmp_path):
    files = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("東京" * 50)
        files.append(str(tmp_path / f"{name}.txt"))
    encoder = byte_encoder(separator="<|endoftext|>")
    prepare(files, tmp_path / "out", encoder=encoder, val=0.35, separator_at="starts")
    for part, characters in (("train", 65), ("val", 35)):
        ids = tokens_of(tmp_path / "out", part)
        places = np.flatnonzero(ids == 256)
        assert places.tolist() == [0, ids.size // 2] and ids.size == 2 * (1 + 3 * characters)
    source = as_source(str(tmp_path / "out"))
    assert source.stream.separator == 256 and source.stream.separator_at == "starts"


def test_special_tokens_that_are_written_in_a_text_stay_text(tmp_path):
    vocab = {chr(i): i for i in range(32, 127)} | {"</s>": 127}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.add_special_tokens(["</s>"])
    Tokenizer(backend).save(tmp_path / "tokenizer.json")
    assert usual_separator(tmp_path / "tokenizer.json") == "</s>"
    encoder = file_encoder(tmp_path / "tokenizer.json", separator="</s>")
    assert encoder.encode(["a</s>"])[0].tolist() == [vocab[c] for c in "a</s>"]
    assert (encoder.separator, encoder.vocab_size) == (127, 128)
    with pytest.raises(ValueError, match=r"it has no '<eos>'"):
        file_encoder(tmp_path / "tokenizer.json", separator="<eos>")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("x.jsonl", b'{"text": "a"}\n[1]\n', r"x\.jsonl, line 2: needed a JSON object; got list"),
        ("x.jsonl", b'{"text": "a"}\n{"tex\n', r"x\.jsonl, line 2: not JSON"),
        (
            "x.jsonl",
            b'{"body": "a"}\n',
            r"needed text in the field 'text'; its fields are \['body'\]",
        ),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("x.txt", b"caf\xe9", "needed UTF-8 text"),
        ("x.txt", b"", "needed a file with text"),
        ("x.bin", b"abc", "needed text, JSON lines or Parquet"),
        ("x.json", b' [{"text": "a"}]\n', r"x\.json is a JSON array: write one object a line"),
        ("x.jsonl", b'{"text": "a"}\n', "no document came into the part"),
    ],
)
def test_what_cannot_be_prepared_is_named_and_leaves_no_folder(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        prepare([str(tmp_path / name)], tmp_path / "out", encoder=byte_encoder())
    assert not (tmp_path / "out").exists()


def test_json_lines_are_no_text_by_name_and_by_content(tmp_path):
    lines = json_lines(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"x\.jsonl is JSON lines: jaxcp prepare .*x\.jsonl"):
        TextSource(path=lines).batch(0, 1, 4)
    pathlib.Path(lines).rename(tmp_path / "x.txt")
    with pytest.raises(ValueError, match=r"x\.txt is JSON lines"):
        TextSource(path=str(tmp_path / "x.txt")).batch(0, 1, 4)


KILLED = """
import os, signal, sys
from jaxcp.data.prepare import prepare
from jaxcp.text.encoders import byte_encoder

def on_read(done):
    if done > 2000:
        os.kill(os.getpid(), signal.SIGKILL)

prepare([sys.argv[1]], sys.argv[2], encoder=byte_encoder(), on_read=on_read)
"""


def test_a_killed_prepare_leaves_no_folder_and_the_next_one_begins_anew(tmp_path):
    file, out = json_lines(tmp_path / "x.jsonl"), tmp_path / "out"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, file, str(out)], env=env)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists() and (tmp_path / "out.preparing").is_dir()
    prepare([file], out, encoder=byte_encoder(separator="<|endoftext|>"))
    assert tokens_of(out, "train").size > 1000 and not (tmp_path / "out.preparing").exists()
    with pytest.raises(ValueError, match="needed an empty folder"):
        prepare([file], out, encoder=byte_encoder())


def test_a_folder_whose_files_were_exchanged_is_refused(tmp_path):
    prepare([SHAKESPEARE], tmp_path / "out", encoder=byte_encoder(), shard_tokens=600_000)
    folder = tmp_path / "out"
    (folder / "train-00000.bin").write_bytes((folder / "train-00001.bin").read_bytes())
    with pytest.raises(ValueError, match="it is of another folder"):
        as_source(str(folder)).batch(0, 1, 8)
    assert open_tokens(folder / "val-00000.bin").size == 111_540
    index = json.loads((folder / "prepared.json").read_text())
    index["train"][0]["file"] = "../x.bin"
    (folder / "prepared.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="a shard must be a file of the folder"):
        as_source(str(folder)).batch(0, 1, 8)
