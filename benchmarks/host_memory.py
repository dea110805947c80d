# SPDX-License-Identifier: Apache-2.0
"""Times the next turn of a long conversation: kept in the pool, brought back from the host, or
computed again.

The pool has room for one conversation, and two take turns; on 8 emulated devices where there are no
others, with the shipped checkpoint.

    python -m benchmarks.host_memory
"""

import dataclasses
import logging

import jax
import tyro

import jaxcp
from benchmarks.tables import table, versions
from jaxcp.checkpoints import NEEDLE
from jaxcp.data.haystack import make_haystack


@dataclasses.dataclass
class Args:
    tokens: int = 16_000
    """Tokens of a conversation, computed as one chunk."""
    turn: int = 48
    """Tokens of its next turn, computed as one that every device has."""
    seq: int = 8
    host_memory: int = 2**30


def main(args: Args) -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("jaxcp").setLevel(logging.INFO)
    jaxcp.emulate_devices(args.seq)
    with jax.set_mesh(jaxcp.make_mesh(seq=args.seq)):
        model, tokenizer = jaxcp.load(NEEDLE)
        room = args.tokens + 8 * args.turn
        engine = jaxcp.Engine(
            model, tokenizer, max_len=room, max_rows=1, pool_tokens=room,
            host_memory=args.host_memory,
        )  # fmt: skip
    texts = [make_haystack(args.tokens, 20, seed=seed).text[: args.tokens] for seed in (0, 1)]
    one, two = (list(text.encode()) for text in texts)
    measured(engine, "compiles", one), measured(engine, "compiles", turn(one, args))
    measured(engine, "evicts", two)
    lines = [measured(engine, "from the host", turn(one, args))]
    lines.append(measured(engine, "in the pool", turn(one, args)))
    tree = engine.scheduler.tree
    tree.clear(lost=True)
    tree.lose(tree.host.blocks())
    lines.append(measured(engine, "computed again", turn(one, args)))
    print(f"\n{versions('jax')}, {jax.devices()[0].device_kind}, seq={args.seq}\n")
    print(table(("next turn", "tokens", "reused", "from the host", "seconds to its token"), lines))


def turn(history: list[int], args: Args) -> list[int]:
    """The history with as many tokens more, which it has from now on."""
    history += [*b"\n[key 4831 is "] + [ord("7")] * (args.turn - 14)
    return history


def measured(engine: jaxcp.Engine, name: str, prompt: list[int]) -> tuple[str, ...]:
    (result,) = engine.generate([prompt], jaxcp.Sampling(max_new_tokens=1))
    stats, seconds = result.stats, result.stats.time_to_first_token
    numbers = f"{len(prompt):,}", f"{stats.reused:,}", f"{stats.restored:,}", f"{seconds:.2f}"
    return name, *numbers


if __name__ == "__main__":
    main(tyro.cli(Args))
