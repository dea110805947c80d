# SPDX-License-Identifier: Apache-2.0
"""Look for tokamax's best block sizes on a chip: what flash.py's short list comes from.

python -m benchmarks.deviceless.search v6e --head-dims 128 --what forward --max-seconds 1800
"""

import argparse
import itertools
import time

from benchmarks.deviceless import flash
from benchmarks.deviceless.tpu import attempt, per_tile
from jaxcp.compile.machine_code import SLICES, Compiler

SIZES = {
    "forward": dict(
        q=(1024, 2048, 512, 4096),
        kv=(1024, 2048, 4096),
        compute=(512, 1024, 256),
        seq_minor=("", "k", "kv", "qkv"),
        scheduler=(True, False),
    ),
    "backward": dict(
        q=(1024, 2048, 512),
        kv=(1024, 2048, 512),
        compute=(512, 1024, 256),
        seq_minor=("", "q", "k"),
        scheduler=(False, True),
    ),
}


def candidates(what: str):
    """Yield sizes, those with fewest changes from the first of each list first."""
    lists = SIZES[what]
    every = itertools.product(*(range(len(values)) for values in lists.values()))
    for at in sorted(every, key=lambda at: (sum(i > 0 for i in at), at)):
        chosen = {name: values[i] for i, (name, values) in zip(at, lists.items(), strict=True)}
        if chosen["compute"] <= chosen["kv"]:
            yield flash.Splash(**chosen)


def search(compiler: Compiler, what: str, head_dim: int, deadline: float) -> None:
    """Print what tokamax's kernel costs, each size as it comes, the best at the end."""

    def count(kernels):
        (kernel,) = (x for name, x in kernels.items() if what == "forward" or "_dkv" in name)
        flops = flash.flops(what, head_dim)
        return per_tile(compiler.chip, kernel, (blocks.q, blocks.kv), flops)

    tried, left = [], list(candidates(what))
    while left and time.monotonic() < deadline:
        blocks = left.pop(0)
        row = attempt(compiler, flash.splash(head_dim, blocks, gradient=what == "backward"), count)
        said = f"{row['unmasked']:,.0f}" if "unmasked" in row else row["error"][:80]
        print(f"  {blocks}: {said} in {row.get('cpu_seconds', 0):.0f} s", flush=True)
        if "unmasked" in row:
            tried.append((row["unmasked"], str(blocks)))
    print(f"{compiler.chip} {what} D={head_dim}, {len(left)} not tried; the best:")
    for cycles, blocks in sorted(tried)[:5]:
        print(f"  {cycles:,.0f} {blocks}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("chip", choices=SLICES)
    parser.add_argument("--head-dims", type=int, nargs="*", default=flash.HEAD_DIMS)
    parser.add_argument("--what", nargs="*", default=tuple(SIZES), choices=tuple(SIZES))
    parser.add_argument("--max-seconds", type=float, default=1800, help="for each head dim")
    args = parser.parse_args()
    compiler = Compiler(args.chip)
    for what, head_dim in itertools.product(args.what, args.head_dims):
        search(compiler, what, head_dim, time.monotonic() + args.max_seconds)
    compiler.close()


if __name__ == "__main__":
    main()
