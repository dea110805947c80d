# SPDX-License-Identifier: Apache-2.0
"""What is not read is refused in one line, which says what to do."""

import shutil

import pytest
from tiny_checkpoints import FIXTURES, write

import jaxcp

METHODS = {
    "bitsandbytes": "Load the plain checkpoint.*jaxcp quantize",
    "hqq": "Load the plain checkpoint", "quanto": "Load the plain checkpoint",
    "aqlm": "Load the plain checkpoint", "eetq": "Load the plain checkpoint",
    "torchao": "save them dequantized", "gguf": "folder of safetensors",
    "auto-round": "Export it as auto_gptq", "intel/auto-round": "Export it as auto_gptq",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_methods(method, tmp_path):
    path = write(tmp_path / "q", "qwen3-tiny", {}, quantization_config={"quant_method": method})
    with pytest.raises(NotImplementedError, match=rf"got {method}\. .*{METHODS[method]}") as error:
        jaxcp.load(path)
    assert str(error.value).count("\n") == 0


def test_a_config_of_bitsandbytes_before_it_had_a_name(tmp_path):
    old = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path = write(tmp_path / "q", "qwen3-tiny", {}, quantization_config=old)
    with pytest.raises(NotImplementedError, match="got bitsandbytes"):
        jaxcp.load(path)


FILES = {
    "pytorch_model.bin": r"pytorch_model\.bin is pickled.*save_pretrained\(OUT\).*; load OUT",
    "consolidated.00.pth": r"consolidated\.00\.pth is pickled",
    "model.pt": r"model\.pt is pickled",
    "model-Q4_K_M.gguf": r"model-Q4_K_M\.gguf is not read: load the folder of safetensors",
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    """In a folder with a config.json and in one without, and by their own path."""
    (tmp_path / name).touch()
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(FileNotFoundError, match=FILES[name]):
            jaxcp.load(path)
    shutil.copy(FIXTURES / "gpt2-tiny/config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=FILES[name]):
        jaxcp.load(tmp_path)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_names_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="A hub id is no path: fetch it"):
        jaxcp.load(name)


def test_the_folder_of_a_run_says_where_its_checkpoint_is(tmp_path):
    for name in ("config.json", "resolved.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"is the folder of a run: its checkpoint is .*model,"):
        jaxcp.load_config(tmp_path)
