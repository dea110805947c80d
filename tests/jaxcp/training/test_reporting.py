# SPDX-License-Identifier: Apache-2.0
"""Reports elsewhere: TensorBoard's files, decoded here by the description of the format."""

import struct
import sys
import types

import pytest

from jaxcp.models.gpt.config import GPTConfig
from jaxcp.training import TextSource, TrainConfig
from jaxcp.training.reporting import TensorBoard, WandB, crc32c

RECORD = {
    "step": 300, "loss": 2.5, "tokens_per_second": None, "mfu_mask": "causal",
    "router_load": [[1, 2]], "startup": {"compile": 1.5},
}  # fmt: skip


def fields(message):
    """`(number, value)` of a protobuf message: varints, 4 or 8 bytes, or strings."""
    out, at = [], 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        size = {0: None, 1: 8, 5: 4}.get(tag & 7)
        if tag & 7 == 0:
            out.append((tag >> 3, varint()))
            continue
        size = varint() if tag & 7 == 2 else size
        out.append((tag >> 3, message[at : at + size]))
        at += size
    return out


def test_the_checksum_is_that_of_the_catalogue():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C/ISCSI
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_tensorboard_finds_the_numbers_of_a_record(tmp_path):
    board = TensorBoard(tmp_path)
    board.start(step=0, steps=300)
    board.log(RECORD)
    board.stop()
    [path] = tmp_path.glob("events.out.tfevents.*")
    data, events = path.read_bytes(), []
    while data:
        length, crc = struct.unpack_from("<QI", data)
        body, (after,) = data[12 : 12 + length], struct.unpack_from("<I", data, 12 + length)
        for content, stored in ((data[:8], crc), (body, after)):
            turned = (stored - 0xA282EAD8) % 2**32
            assert (turned >> 17 | turned << 15) % 2**32 == crc32c(content)
        events.append(fields(body))
        data = data[16 + length :]
    assert (3, b"brain.Event:2") in events[0]
    [(_, step), (_, summary)] = [field for field in events[1] if field[0] in (2, 5)]
    values = [dict(fields(value)) for _, value in fields(summary)]
    named = {value[1].decode(): struct.unpack("<f", value[2])[0] for value in values}
    assert step == 300 and named == {"loss": 2.5, "startup/compile": 1.5}


def test_wandb_gets_the_config_and_the_numbers(tmp_path, monkeypatch):
    model = GPTConfig(vocab_size=256, max_positions=8, num_layers=1, num_heads=1, embed_dim=8)
    config = TrainConfig(
        model=model, seq_len=8, batch_size=1, steps=1, data=TextSource(), out_dir=tmp_path / "one"
    )
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install jaxcp\[wandb\]"):
        WandB("project", config)
    calls = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: calls.append((numbers, step)), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    callback = WandB("project", config)
    callback.start(step=0, steps=1)
    callback.log(RECORD)
    callback.stop()
    options, logged, end = calls
    assert options["name"] == "one" and options["config"]["model"]["embed_dim"] == 8
    assert (logged, end) == (({"loss": 2.5, "startup/compile": 1.5}, 300), "end")
