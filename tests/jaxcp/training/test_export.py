# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of a run has the tokenizer of its data, whichever made it."""

import json
import pathlib

import numpy as np
import pytest
from flax import nnx

import jaxcp
from jaxcp.data.prepare import prepare, symbols
from jaxcp.text.encoders import byte_encoder, char_encoder
from jaxcp.training import Mixture, TextSource, TokenFiles, TrainConfig, export_run
from jaxcp.training.loop import Result

TEXT = "To be, or not\nto be: that is the question."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Prepared folders by characters and by bytes, the latter with a separator."""
    out = tmp_path_factory.mktemp("data")
    (out / "a.txt").write_text(TEXT * 20)
    file = str(out / "a.txt")
    prepare([file], out / "chars", encoder=char_encoder(symbols([file])))
    prepare([file], out / "bytes", encoder=byte_encoder(separator="<|endoftext|>"))
    np.zeros(50, "<u2").tofile(out / "raw.bin")
    return {name: str(out / name) for name in ("a.txt", "chars", "bytes", "raw.bin")}


def exported(data, vocab_size, out):
    model = jaxcp.GPTConfig(
        vocab_size=vocab_size, max_positions=64, num_layers=1, num_heads=1, embed_dim=8
    )
    config = TrainConfig(
        model=model, seq_len=8, batch_size=1, steps=1, data=data, out_dir=out / "run"
    )
    result = Result(
        final_loss=1.0, steps=1, resumed_from=None, seconds=1.0, metrics_path=out,
        checkpoint_path=out, model=jaxcp.GPT(model, rngs=nnx.Rngs(0)),
    )  # fmt: skip
    return jaxcp.load(export_run(result, config, out / "model"))


@pytest.mark.parametrize(
    ("source", "vocab_size"),
    [("chars", 20), ("bytes", 257), ("text", 20), ("mixture", 20), ("raw", 256), ("mixed", 257)],
)
def test_a_checkpoint_talks_as_its_data_do(folders, tmp_path, source, vocab_size):
    data = {
        "chars": folders["chars"],
        "bytes": TokenFiles(pattern=folders["bytes"]),
        "text": TextSource(path=folders["a.txt"], alphabet="characters"),
        "mixture": Mixture(sources=(folders["chars"], folders["chars"]), weights=(1, 2)),
        "raw": folders["raw.bin"],
        "mixed": Mixture(sources=(folders["chars"], folders["bytes"]), weights=(1, 2)),
    }[source]
    model, tokenizer = exported(data, vocab_size, tmp_path)
    if source in ("raw", "mixed"):  # nobody knows, or not all alike
        assert tokenizer is None
        return
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert model.stop_tokens == ((256,) if source == "bytes" else ())
    fields = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert fields.get("eos_token") == ("<|endoftext|>" if source == "bytes" else None)


@pytest.mark.parametrize(("source", "vocab_size"), [("chars", 20), ("bytes", 257)])
def test_transformers_encodes_as_we_do(folders, tmp_path, source, vocab_size):
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    _, tokenizer = exported(folders[source], vocab_size, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(pathlib.Path(tmp_path, "model")))
    assert theirs(TEXT).input_ids == tokenizer.encode(TEXT).tolist()
    assert theirs.decode(theirs(TEXT).input_ids) == TEXT
