# SPDX-License-Identifier: Apache-2.0
"""Callbacks that report a run elsewhere: TensorBoard's files, Weights & Biases.

`metrics.jsonl` has everything; these have its numbers.
"""

import importlib
import pathlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

from jaxcp.training.config import TrainConfig
from jaxcp.training.identity import plain
from jaxcp.training.metrics import Record

POLYNOMIAL = 0x82F63B78  # CRC-32C, bits reversed


class TensorBoard:
    """Writes the numbers of each record into `folder/events.out.tfevents.*`, without TensorFlow.

    A file is TFRecords (u64 length, its masked CRC-32C, the bytes, theirs) of `Event` messages.
    Source: tensorflow/core/lib/io/record_writer.h and util/event.proto.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def start(self, *, step: int, steps: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self.file = (self.folder / name).open("wb")
        self._write(_bytes(3, b"brain.Event:2"))

    def log(self, record: Record) -> None:
        values = b"".join(
            _bytes(1, _bytes(1, name.encode()) + b"\x15" + struct.pack("<f", value))
            for name, value in numbers(record)
        )
        self._write(b"\x10" + _varint(record["step"]) + _bytes(5, values))
        self.file.flush()

    def stop(self) -> None:
        self.file.close()

    def _write(self, event: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + event
        length = struct.pack("<Q", len(event))
        self.file.write(length + _masked(length) + event + _masked(event))


class WandB:
    """Logs the numbers of each record to a run on Weights & Biases (the extra `wandb`).

    Raises:
      ModuleNotFoundError: there is no wandb.
    """

    def __init__(self, project: str, config: TrainConfig):
        try:
            self.wandb: Any = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "reports to Weights & Biases need wandb: pip install jaxcp[wandb]"
            ) from error
        self.project, self.config = project, config

    def start(self, *, step: int, steps: int) -> None:
        name = pathlib.Path(self.config.out_dir).name
        fields = plain(self.config, everything=True)
        self.run = self.wandb.init(project=self.project, name=name, config=fields)

    def log(self, record: Record) -> None:
        self.run.log(dict(numbers(record)), step=record["step"])

    def stop(self) -> None:
        self.run.finish()


def numbers(record: Record) -> Iterator[tuple[str, float]]:
    """List the numbers of a record but its step; those inside another by `startup/compile`."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", float(x)) for inner, x in value.items())
        elif isinstance(value, int | float) and name != "step":
            yield name, float(value)


def crc32c(data: bytes) -> int:
    """The CRC-32C (Castagnoli) of some bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ POLYNOMIAL * (crc & 1)
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _bytes(field: int, data: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])
