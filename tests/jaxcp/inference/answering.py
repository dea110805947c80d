# SPDX-License-Identifier: Apache-2.0
"""Answers of an engine as JSON, in one process or, with `ADDRESS PROCESSES ID`, in several."""

import json
import os
import sys

import jax
import numpy as np

import jaxcp
from jaxcp import Sampling, processes

# the number of devices of this process is JAX_NUM_CPU_DEVICES


def answers(folder, mesh):
    """Token ids of three requests together, again in a second turn, and of one by drafts."""
    with jax.set_mesh(mesh):
        model, _ = jaxcp.load(folder)
        options = {"max_len": 160, "stop_tokens": (), "max_rows": 3}
        engine = jaxcp.Engine(model, None, **options)
        ids = np.random.default_rng(0).integers(1, model.config.vocab_size, (3, 70)).tolist()
        rules = [
            Sampling(max_new_tokens=9),
            Sampling(max_new_tokens=12, temperature=0.8, seed=3),
            Sampling(max_new_tokens=7, repetition_penalty=1.2),
        ]
        first = together(engine, ids, rules)
        again = [a + b + [5, 6] for a, b in zip(ids, (x for x, _ in first), strict=True)]
        second = together(engine, again, rules)
        drafted = jaxcp.Engine(model, None, drafts=3, **options)
        ((third, _),) = together(drafted, [ids[0][:20] * 3], rules[:1])
        score = engine.score(ids[1][:40])
    return {
        "first": [x for x, _ in first], "second": second, "drafts": third,
        "score": [round(x.logprob, 3) for x in score[1:]],
    }  # fmt: skip


def together(engine, prompts, rules):
    """`(token ids, how many tokens were known)` of requests that run beside each other."""
    requests = [engine.add(ids, rule) for ids, rule in zip(prompts, rules, strict=True)]
    while not all(request.done for request in requests):
        engine.step()
    results = [engine.result(request) for request in requests]
    return [([*result.tokens], result.stats.reused) for result in results]


def main(folder, axes, *address):
    if address:
        coordinator, count, number = address
        processes.join(coordinator=coordinator, processes=int(count), process_id=int(number))
    found = answers(folder, jaxcp.make_mesh(**json.loads(axes)))
    print("ANSWERS", json.dumps(found), flush=True)
    if address:
        processes.part()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(*sys.argv[1:])
