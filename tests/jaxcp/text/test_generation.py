# SPDX-License-Identifier: Apache-2.0
"""An answer ends where the checkpoint says: `eos_token_id` of its two files, in all spellings."""

import json
import shutil

import pytest
from tiny_checkpoints import FIXTURES

import jaxcp
from jaxcp.cli.main import main
from jaxcp.text.generation import read_stop_tokens
from jaxcp.text.tokenizer import byte_level
from jaxcp.weights.quantizing import quantize

ABSENT = object()


def write(folder, **files):
    """generation=, config=: the value of eos_token_id in that file; None of the file if ABSENT."""
    for name, value in files.items():
        file = folder / {"generation": "generation_config.json", "config": "config.json"}[name]
        fields = json.loads(file.read_text()) if file.exists() else {}
        fields.pop("eos_token_id", None)
        file.write_text(json.dumps(fields | ({} if value is ABSENT else {"eos_token_id": value})))


@pytest.fixture
def folder(tmp_path):
    """GPT-2 of 256 tokens, with GPT-2's own eos: 50256."""
    shutil.copytree(FIXTURES / "gpt2-tiny", tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, ()),
        ({"config": 7}, (7,)),
        ({"config": [7, 9, 7]}, (7, 9)),
        ({"config": None}, ()),
        ({"config": []}, ()),
        ({"config": 7, "generation": 8}, (8,)),
        ({"config": 7, "generation": [9, 8]}, (9, 8)),
        ({"config": 7, "generation": ABSENT}, (7,)),
        ({"config": 7, "generation": None}, ()),  # it speaks of them, and says none
        ({"generation": 0}, (0,)),
        ({"config": 50256}, ()),
        ({"generation": [50256, 8]}, (8,)),
        ({"config": 255, "generation": 256}, ()),
    ],
)
def test_where_they_stand(files, expected, tmp_path, caplog):
    write(tmp_path, **files)
    assert read_stop_tokens(tmp_path, 256) == expected
    assert ("cannot end an answer" in caplog.text) == ("256" in str(files))


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"text_config": {"eos_token_id": 7}}, (7,)),  # Qwen3.5
        ({"text_config": {"eos_token_id": [7, 8]}, "eos_token_id": 9}, (9,)),  # Gemma 4
        ({"text_config": {"eos_token_id": 7}, "eos_token_id": None}, ()),
        ({"text_config": {}}, ()),
        ({"text_config": None}, ()),
    ],
)
def test_of_a_model_that_is_more_than_a_language_model(fields, expected, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(fields))
    assert read_stop_tokens(tmp_path, 256) == expected
    write(tmp_path, generation=5)
    assert read_stop_tokens(tmp_path, 256) == (5,)
    file.write_text('{"text_config": {"eos_token_id": "7"}}')
    write(tmp_path, generation=ABSENT)
    with pytest.raises(ValueError, match=r"null as eos_token_id; .*config\.json has '7'"):
        read_stop_tokens(tmp_path, 256)


@pytest.mark.parametrize("name", ["config", "generation"])
def test_what_is_no_id(name, folder):
    for value in ("2", ["2"], 2.0, -1, [7, -1], True, [[7]], {"id": 7}, [None], ""):
        write(folder, **({"config": 7} | {name: value}))
        with pytest.raises(ValueError, match=rf"null as eos_token_id; .*{name}.*\.json has "):
            jaxcp.load(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"needed JSON; got .*generation_config\.json"):
        jaxcp.load(folder)


def test_they_are_what_an_engine_goes_by(folder):
    write(folder, generation=[3, 4])
    model, _ = jaxcp.load(folder)
    assert jaxcp.Engine(model, None, max_len=8).stop_tokens == model.stop_tokens == (3, 4)
    for stops in ((), (5,), [5, 6], {5}):
        engine = jaxcp.Engine(model, None, max_len=8, stop_tokens=stops)
        assert engine.stop_tokens == tuple(stops)
    never_loaded = jaxcp.abstract_model(model.config)
    assert jaxcp.Engine(never_loaded, None, max_len=8).stop_tokens == ()


def test_they_are_kept(folder, tmp_path):
    """Saved, saved again with others, quantized."""
    write(folder, generation=[3, 4])
    model, _ = jaxcp.load(folder)
    jaxcp.save(model, tmp_path / "out")
    assert jaxcp.load(tmp_path / "out")[0].stop_tokens == (3, 4)
    write(tmp_path / "out", config=9)  # a folder that says something else
    file = tmp_path / "out/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.7}))
    for stops in ((5,), (), (5, 6)):
        model.stop_tokens = stops
        jaxcp.save(model, tmp_path / "out")
        assert jaxcp.load(tmp_path / "out")[0].stop_tokens == stops
    assert json.loads(file.read_text()) == {"temperature": 0.7, "eos_token_id": [5, 6]}
    model.stop_tokens = ()
    jaxcp.save(model, tmp_path / "none")
    assert not (tmp_path / "none/generation_config.json").exists()
    quantize(folder, tmp_path / "int8", weights="int8", only="all")
    assert jaxcp.load(tmp_path / "int8")[0].stop_tokens == (3, 4)


def test_advice_on_sampling_is_kept(folder, tmp_path):
    """All of the file: saved into a new folder, over another checkpoint's, and without its ids."""
    file = folder / "generation_config.json"
    advice = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "eos_token_id": 3}
    file.write_text(json.dumps(advice | {"transformers_version": "4.51", "max_new_tokens": 32768}))
    byte_level().save(folder / "tokenizer.json")
    model, tokenizer = jaxcp.load(folder)
    jaxcp.save(model, tmp_path / "out", tokenizer)
    saved = tmp_path / "out/generation_config.json"
    assert json.loads(saved.read_text()) == json.loads(file.read_text())
    again, tokenizer = jaxcp.load(tmp_path / "out")
    assert (tokenizer.defaults.temperature, tokenizer.defaults.top_p) == (0.6, 0.95)
    assert (tokenizer.defaults.top_k, again.stop_tokens) == (20, (3,))
    saved.write_text(json.dumps({"temperature": 1.5, "min_p": 0.1}))
    jaxcp.save(again, tmp_path / "out")
    assert json.loads(saved.read_text()) == json.loads(file.read_text()) | {"min_p": 0.1}
    again.stop_tokens = (4, 5)
    jaxcp.save(again, tmp_path / "new")
    written = json.loads((tmp_path / "new/generation_config.json").read_text())
    assert written == json.loads(file.read_text()) | {"eos_token_id": [4, 5]}


def test_on_the_command_line(folder, capsys):
    """The eos is what the model says first."""
    byte_level().save(folder / "tokenizer.json")
    model, _ = jaxcp.load(folder)
    write(folder, generation=int(jaxcp.logits(model, [list(b"abc")])[0, -1].argmax()))
    for options, count in (((), 0), (("--ignore-eos",), 1)):
        text = "--prompt", "abc", "--max-new-tokens", "1"
        main(["generate", "--checkpoint", str(folder), *text, *options])
        out, errors = capsys.readouterr()
        assert f" {count} generated" in errors and (out == "") == (count == 0)
