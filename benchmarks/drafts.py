# SPDX-License-Identifier: Apache-2.0
"""Cost of drafts by a model's own MTP layer where none is right, and their gain where all are.

A mixture of random weights, on one device, answers random prompts; no text repeats itself. Where it
samples at temperature 1, no draft is right. The same model, whose blocks add nothing to the stream,
says each token by the one before alone, and so does its MTP layer: every draft is right. Programs
and sizes are the same, everything is compiled before, and the answers with drafts must be those
without.

    python -m benchmarks.drafts --out benchmarks/results
"""

import dataclasses
import datetime
import math
import pathlib
import statistics
import time

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxcp
from benchmarks.engine_speed import SIZES
from benchmarks.tables import table, versions, write
from jaxcp.models import config_from_dict


@dataclasses.dataclass
class Args:
    out: pathlib.Path | None = None
    """A folder for drafts.md; None prints alone."""
    size: str = "tiny"
    layers: int = 48
    """Layers beside the MTP layer, which always keeps its own keys: a part of each step."""
    prompt: int = 256
    """Tokens of a prompt."""
    new_tokens: int = 512
    rows: tuple[int, ...] = (1, 4)
    drafts: int = 3
    repeats: int = 3
    """Runs with and without drafts, by turns; the medians are compared."""


def model_of(args: Args) -> jaxcp.HybridMoE:
    fields = SIZES[args.size] | {
        "num_hidden_layers": args.layers,
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "max_position_embeddings": 4096, "norm_topk_prob": True, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "torch_dtype": "float32",
    }  # fmt: skip
    config = dataclasses.replace(config_from_dict(fields), num_mtp_layers=1)
    return jaxcp.HybridMoE(config, rngs=nnx.Rngs(0))


def foreseeable(model: jaxcp.HybridMoE) -> jaxcp.HybridMoE:
    """Let nothing be added to the stream, and the MTP layer see the next token alone."""
    graph, state = nnx.split(model)

    def leaf(path, value):
        names = jax.tree_util.keystr(path)
        if "'o'" in names or "'down'" in names:
            return jnp.zeros_like(value)
        if "'join'" in names:
            return jnp.stack([jnp.eye(value.shape[1]), jnp.zeros(value.shape[1:])])
        return value

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(leaf, state))


def engine_of(model: jaxcp.HybridMoE, args: Args, drafts: int) -> jaxcp.Engine:
    room = args.prompt + args.new_tokens + args.drafts + 1
    engine = jaxcp.Engine(
        model, None, max_len=room, max_rows=max(args.rows), stop_tokens=(), drafts=drafts,
        max_wait=math.inf,
    )  # fmt: skip
    engine.warm_up()
    return engine


def seconds_and_answers(engine, rows: int, args: Args, temperature: float):
    """Seconds of the answers behind known prompts, tokens a row and step, and the answers."""
    rng = np.random.default_rng(rows)
    prompts = rng.integers(0, SIZES[args.size]["vocab_size"], (rows, args.prompt)).tolist()
    sampling = jaxcp.Sampling(max_new_tokens=args.new_tokens, temperature=temperature, seed=1)
    engine.generate(prompts, jaxcp.Sampling(max_new_tokens=1))
    start = time.perf_counter()
    results = engine.generate(prompts, sampling)
    seconds = time.perf_counter() - start
    moments = sum(len(set(result.stats.token_times)) for result in results)
    return seconds, rows * args.new_tokens / moments, [result.tokens for result in results]


def compare(name: str, model, args: Args, temperature: float):
    """Lines of a table, a number of rows each."""
    engines = [engine_of(model, args, drafts) for drafts in (0, args.drafts)]
    for rows in args.rows:
        runs = [
            [seconds_and_answers(engine, rows, args, temperature) for engine in engines]
            for _ in range(args.repeats)
        ]
        plain, drafted = zip(*runs, strict=True)
        assert plain[0][2] == drafted[0][2], "drafts change an answer"
        without, with_ = (statistics.median(run[0] for run in kind) for kind in (plain, drafted))
        tokens = rows * args.new_tokens
        yield (
            name, str(rows), f"{tokens / without:,.0f}", f"{tokens / with_:,.0f}",
            f"{without / with_:.2f}", f"{drafted[-1][1]:.2f}",
        )  # fmt: skip


def main(args: Args) -> None:
    model = model_of(args)
    head = ("drafts", "rows", "tokens/s without", "with", "times as fast", "tokens a step")
    lines = [
        *compare("none right", model, args, temperature=1.0),
        *compare("all right", foreseeable(model), args, temperature=0.0),
    ]
    text = f"""# Drafts by an MTP layer, {datetime.date.today()}

{versions("jax")}; {jax.devices()[0].device_kind}; a {args.size} mixture of {args.layers} layers, \
float32, prompts of {args.prompt} tokens that are in the cache, {args.new_tokens} new ones, at \
most {args.drafts} drafts. `python -m benchmarks.drafts`

{table(head, lines)}"""
    write(args.out, "drafts.md", text)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
