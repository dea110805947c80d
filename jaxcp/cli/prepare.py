# SPDX-License-Identifier: Apache-2.0
"""Commands that prepare: `tune` block sizes for a chip, `quantize` a checkpoint."""

import json
import pathlib
from typing import Annotated, Literal

import tyro


def tune(
    *,
    op: Literal["flash_attention", "grouped_matmul", "decode_attention"],
    target: Literal["sm_120", "h200", "v5e", "v5p", "v6e", "tpu7x"],
    part: str | None = None,
    shape: tuple[str, ...] = (),
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    max_seconds: float = 300,
    json_file: Annotated[pathlib.Path | None, tyro.conf.arg(name="json")] = None,
    write: bool = False,
) -> None:
    """Find block sizes, warps and stages of a kernel, and print the row for its tuning.py.

    By time when the device is here, else by what the compiled kernel costs: bundles on a TPU;
    on a GPU issue slots, with spills and too much shared memory refused. Nothing needs to be
    there for that but `pip install jaxcp[tune]`, and running it twice gives the same row.

    Args:
        op: the operation.
        target: the chip. Rows of sm_120 are those of any NVIDIA GPU without rows of its own.
        part: a name in the first column of the table, such as mosaic_backward; default: forward.
        shape: sizes other than the default, such as head_dim=64 tokens=4096.
        dtype: of the operands.
        max_seconds: limit of the search; what it leaves untried is said.
        json_file: write everything that was tried into this file.
        write: put the row into the table of the installed package.
    """
    from jaxcp.tune import search
    from jaxcp.tune.show import progress, show

    with progress() as step:
        result = search(
            op, target, part=part, shape=_sizes(shape), dtype=dtype, max_seconds=max_seconds,
            progress=step,
        )  # fmt: skip
    show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result.as_json(), indent=1) + "\n")
    if write:
        print("written" if result.row.write() else "the table has it")


def _sizes(shape: tuple[str, ...]) -> dict[str, int]:
    pairs = [text.partition("=") for text in shape]
    if wrong := [
        text for text, (_, _, size) in zip(shape, pairs, strict=True) if not size.isdigit()
    ]:
        raise ValueError(f"--shape takes name=size, such as head_dim=64; got {' '.join(wrong)}")
    return {name: int(size) for name, _, size in pairs}


def quantize(
    source: Annotated[pathlib.Path, tyro.conf.Positional],
    out: Annotated[pathlib.Path, tyro.conf.Positional],
    *,
    weights: Literal["int8", "fp8", "nvfp4", "mxfp8", "int4"],
    only: Literal["experts", "all"] = "all",
) -> None:
    """Write a checkpoint with quantized weights, which all commands read.

    One tensor at a time: the model need not fit into memory.

    Args:
        source: folder with config.json and *.safetensors.
        out: a new folder.
        weights: their format.
        only: "experts": routed experts alone; "all": every weight that its layer can use so.
    """
    from jaxcp.weights.quantizing import quantize as write_quantized

    result = write_quantized(source, out, weights=weights, only=only)
    print(
        f"{len(result.quantized)} tensors in {weights}, {len(result.skipped)} could not be; "
        f"{result.bytes_before / 2**20:,.2f} -> {result.bytes_after / 2**20:,.2f} MiB: {out}"
    )
