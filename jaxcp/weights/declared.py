# SPDX-License-Identifier: Apache-2.0
"""The `quantization_config` of a config.json, compared with the tensors that lie beside it.

Tensors say by themselves how they are quantized (`jaxcp.weights.formats`); config.json says it
again, in the words of the program that wrote it. Where the two disagree, the checkpoint was put
together wrong, and what its tensors seem to say may be wrong too.
"""

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxcp.input_files import read_json
from jaxcp.weights.integers import Integers

CONFIG = "config.json"
FP8 = "fp8", "fp8_block", "mxfp8"
INTEGERS = "int4", "int8"
MODELOPT = {
    "FP8": FP8, "FP8_PER_CHANNEL_PER_TOKEN": FP8, "FP8_PB_WO": FP8, "FP8_PB_REAL": FP8,
    "MXFP8": ("mxfp8",), "NVFP4": ("nvfp4",), "W4A16_NVFP4": ("nvfp4",), "MXFP4": ("mxfp4",),
    "W4A8_MXFP4_FP8": ("mxfp4",), "MIXED_PRECISION": (*FP8, "nvfp4", "mxfp4"),
}  # fmt: skip
COMPRESSED = {
    "float-quantized": FP8, "int-quantized": ("int8",), "naive-quantized": (*FP8, "int8"),
    "pack-quantized": INTEGERS, "nvfp4-pack-quantized": ("nvfp4",),
    "mxfp4-pack-quantized": ("mxfp4",), "mxfp8-quantized": ("mxfp8",),
    "mixed-precision": (*FP8, *INTEGERS, "nvfp4", "mxfp4"),
}  # fmt: skip
ELSE = "Use the checkpoint's plain weights, and `jaxcp quantize` to make them smaller"


def declared(path: str | os.PathLike) -> dict[str, Any]:
    """Read the `quantization_config` of a checkpoint folder; empty where there is none."""
    file = Path(path, CONFIG)
    fields = read_json(file) if file.exists() else {}
    text = fields.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    found = fields.get("quantization_config") or inner or {}
    return dict(found) if isinstance(found, Mapping) else {}


def check(path: str | os.PathLike, found: Collection[str], *, whole: bool) -> None:
    """Compare what config.json says with the formats `found` in the tensors, if those are `whole`.

    Raises:
      ValueError: the two disagree.
      NotImplementedError: config.json names a variant that is not read, with what to do instead.
    """
    says = declared(path)
    method = says.get("quant_method", "modelopt" if "quant_algo" in says else None)
    if not says or method is None or (method == "jaxcp" and not found):
        return
    name, allowed, needed = _expected(method, says)
    strange = sorted(set(found) - set(allowed))
    if whole and (strange or not set(found) & set(needed)):
        tensors = ", ".join(sorted(found)) or "not quantized"
        raise ValueError(
            f"the tensors of {path} do not fit its {CONFIG}: quantization_config says {name}, "
            f"which is {' or '.join(needed)}, and the tensors are {tensors}. Use the {CONFIG} and "
            "the safetensors of one checkpoint; of plain weights, take quantization_config out"
        )


def _expected(method: str, says: Mapping[str, Any]) -> tuple[str, Collection[str], Collection[str]]:
    """Name what config.json says, the formats that tensors may have, and those of which they must
    have one."""
    if method == "fp8":  # DeepSeek-V4 has experts in 4 bits beside it
        size = says.get("weight_block_size")
        if size not in (None, [128, 128]):
            _refuse(f"fp8 in blocks of {size}", "[128, 128]")
        return "fp8", (*FP8, "mxfp4", "nvfp4"), FP8
    if method == "modelopt":
        algorithm = says.get("quant_algo")
        formats = _one_of(MODELOPT, algorithm or "MIXED_PRECISION", "modelopt's quant_algo")
        return f"modelopt {algorithm or ''}".strip(), formats, formats
    if method == "compressed-tensors":
        if says.get("transform_config"):
            _refuse("compressed-tensors with a transform_config", "none")
        layout = says.get("format", "mixed-precision")
        formats = _one_of(COMPRESSED, layout, "compressed-tensors' format")
        return f"compressed-tensors {layout}", formats, formats
    if method == "jaxcp":
        weights = str(says.get("weights"))
        return f"jaxcp {weights}", (weights,), (weights,)
    if method == "awq" and (version := str(says.get("version", "gemm"))).lower() != "gemm":
        _refuse(f"awq of version {version:.50}", "gemm")
    if method == "gptq":
        gptq_offset(says)
    formats = {"mxfp4": ("mxfp4",)}.get(method, INTEGERS)
    return method, formats, formats


def check_groups(path: str | os.PathLike, tensors: Iterable[Integers]) -> None:
    """Compare the inputs that share a scale with those that config.json says, where it says them.

    Raises:
      ValueError: a tensor has as many scales as other groups would; it may be cut short.
    """
    sizes = _group_sizes(declared(path))
    for tensor in tensors if sizes else ():
        summed, count = tensor.shape[1], tensor.shape[1] // tensor.block[1]
        if not any(_groups_of(size, summed, tensor.order) == count for size in sizes):
            raise ValueError(
                f"{tensor.scale} in {path} has {count} scales for {summed} inputs, and the "
                f"quantization_config of its {CONFIG} a group_size of "
                f"{' or '.join(map(str, sorted(sizes)))}. Use the {CONFIG} and the safetensors of "
                "one checkpoint"
            )


def _groups_of(size: int, summed: int, order: str | None) -> int:
    """Count the groups of a size; 0 where it does not divide the inputs, and no order says which
    are together."""
    if size == -1 or size >= summed:
        return 1
    return -(-summed // size) if order or summed % size == 0 else 0


def _group_sizes(says: Mapping[str, Any]) -> set[int]:
    """The sizes of groups that config.json names, -1 where all inputs are one; none where tensors
    may have others by their names, or it says nothing."""
    if says.get("dynamic") or says.get("extra_config"):
        return set()
    every: list[Any] = [says]
    if says.get("quant_method") == "compressed-tensors":
        named = says.get("config_groups")
        groups = named.values() if isinstance(named, Mapping) else ()
        every = [x.get("weights") if isinstance(x, Mapping) else None for x in groups]
    sizes: set[int] = set()
    for weights in every:
        if not isinstance(weights, Mapping):
            return set()
        size = weights.get("group_size")
        if weights.get("strategy") in ("channel", "tensor"):
            size = -1
        if type(size) is not int or (size < 1 and size != -1):
            return set()
        sizes.add(size)
    return sizes


def gptq_offset(says: Mapping[str, Any]) -> int | None:
    """Find what is to be added to GPTQ's zero points as they are stored; None of other methods.

    Raises:
      NotImplementedError: a checkpoint_format that is not read.
    """
    if says.get("quant_method") != "gptq":
        return None
    layout = says.get("checkpoint_format") or "gptq"
    return _one_of({"gptq": 1, "gptq_v2": 0}, layout, "gptq's checkpoint_format")


def _one_of(table: Mapping[str, Any], value: Any, what: str) -> Any:
    if not isinstance(value, str) or value not in table:
        _refuse(f"{what} {value!r:.100}", ", ".join(table))
    return table[value]


def _refuse(got: str, supported: str) -> None:
    raise NotImplementedError(f"not read: {got}; read are {supported}. {ELSE}")
