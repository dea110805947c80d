# SPDX-License-Identifier: Apache-2.0
"""Prefill and decoding of the engine beside `generate` of transformers: one model, one device.

The model is a Qwen3-MoE of random weights that both load from the same folder; prompts are random,
and in float32 both must answer alike. Everything is compiled before, and runs once unmeasured.
Without transformers (or on a machine that lacks torch's device) there is our column alone.

    python -m benchmarks.engine_speed --out benchmarks/results
    benchmarks/gpu.sh engine OUT_DIR
"""

import dataclasses
import datetime
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any, Literal

import flax.nnx as nnx
import jax
import numpy as np
import tyro

import jaxcp
from benchmarks.tables import table, versions, write
from jaxcp.models import config_from_dict

SIZES = {
    "tiny": {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 128,
        "intermediate_size": 512, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 4096,
    },
    "1b": {
        "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 512,
        "intermediate_size": 3072, "num_experts": 32, "num_experts_per_tok": 4,
        "vocab_size": 32_768,
    },
}  # fmt: skip


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for engine_speed.md; None prints alone."""
    size: Literal["tiny", "1b"] = "tiny"
    context: int = 2_048
    """Tokens of a prompt, over all rows of a batch: the more rows, the shorter theirs."""
    rows: tuple[int, ...] = (1, 4, 16)
    new_tokens: int = 32
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of a batch: of its prompts, and of the tokens after the first."""

    prefill: float
    decode: float
    answers: list[list[int]]


def model_folder(args: Args, folder: pathlib.Path) -> pathlib.Path:
    """Save a model of random weights, as transformers names them."""
    fields = SIZES[args.size] | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "max_position_embeddings": args.context + args.new_tokens, "norm_topk_prob": True,
        "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "torch_dtype": args.dtype,
    }  # fmt: skip
    config = config_from_dict(fields)
    jaxcp.save(jaxcp.HybridMoE(config, rngs=nnx.Rngs(0)), folder)
    return folder


def prompts(args: Args, rows: int) -> list[list[int]]:
    rng = np.random.default_rng(rows)
    shape = rows, args.context // rows
    return rng.integers(0, SIZES[args.size]["vocab_size"], shape).tolist()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def ours(args: Args, folder: pathlib.Path) -> dict[int, Speed]:
    model, _ = jaxcp.load(folder, dtype=args.dtype)
    engine = jaxcp.Engine(
        model, None, max_len=args.context + args.new_tokens, max_rows=max(args.rows),
        pool_tokens=args.context + max(args.rows) * (args.new_tokens + 64), stop_tokens=(),
    )  # fmt: skip
    engine.warm_up()

    def one(rows: int) -> Speed:
        engine.scheduler.tree.clear()
        given = prompts(args, rows)
        first, _ = timed(lambda: engine.generate(given, jaxcp.Sampling(max_new_tokens=1)))
        whole = jaxcp.Sampling(max_new_tokens=args.new_tokens)
        rest, results = timed(lambda: engine.generate(given, whole))  # the prompts are known
        return Speed(prefill=first, decode=rest, answers=[result.tokens for result in results])

    return {rows: [one(rows), one(rows)][1] for rows in args.rows}


def theirs(args: Args, folder: pathlib.Path) -> dict[int, Speed]:
    import torch
    import transformers

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, args.dtype)
    ).to(device)

    def one(rows: int) -> Speed:
        ids = torch.tensor(prompts(args, rows), device=device)

        def generate(count: int) -> list[list[int]]:
            options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=count,
                max_new_tokens=count, **options,
            )  # fmt: skip
            return out[:, ids.shape[1] :].tolist()

        first, _ = timed(lambda: generate(1))
        whole, answers = timed(lambda: generate(args.new_tokens))
        return Speed(prefill=first, decode=whole - first, answers=answers)

    with torch.inference_mode():
        return {rows: [one(rows), one(rows)][1] for rows in args.rows}


def lines(args: Args, found: dict[str, dict[int, Speed]]):
    for rows in args.rows:
        first: Speed | None = None
        for name, speeds in found.items():
            speed = speeds[rows]
            prefill = args.context // rows * rows / speed.prefill
            decode = rows * (args.new_tokens - 1) / speed.decode
            ratios = "", ""
            if first is None:
                first = speed
            else:
                ratios = (
                    f"{speed.prefill / first.prefill:.2f}",
                    f"{speed.decode / first.decode:.2f}",
                )
            yield str(rows), name, f"{prefill:,.0f}", ratios[0], f"{decode:,.1f}", ratios[1]


def main(args: Args) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(args, pathlib.Path(name) / "model")
        found["jaxcp"] = ours(args, folder)
        try:
            found["transformers"] = theirs(args, folder)
        except ImportError as error:
            print(f"transformers was not measured: {error}")
    if args.dtype == "float32" and "transformers" in found:
        for rows in args.rows:
            same = [speeds[rows].answers for speeds in found.values()]
            assert same[0] == same[1], f"{rows} rows are not answered alike"
    head = (
        "rows",
        "",
        "prefill tokens/s",
        "jaxcp is x times",
        "decode tokens/s",
        "jaxcp is x times",
    )
    text = "\n\n".join(
        [
            f"# The engine beside transformers, {datetime.date.today()}",
            f"{versions('jax', 'torch', 'transformers')}; {jax.devices()[0].device_kind}; a "
            f"{args.size} Qwen3-MoE, {args.dtype}, {args.context:,} tokens of prompts in a batch, "
            f"{args.new_tokens} new ones a row.",
            table(head, list(lines(args, found))),
        ]
    )
    write(args.out, "engine_speed.md", text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
