# SPDX-License-Identifier: Apache-2.0
"""The cost of emulation: the same attention on eight emulated CPU devices and on one.

python -m benchmarks.cp.emulation TOKENS ROUNDS     # prints a line of JSON; one process
"""

import json
import statistics
import sys
import time

import jax
from jax.sharding import Mesh

from benchmarks.cp import problem
from benchmarks.cp.jax_contenders import contender, label, layer_of

DEVICES = 8


def main(tokens: int, rounds: int) -> None:
    import jaxcp

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    arrays = problem.inputs(tokens)
    running = {}
    for strategy in (jaxcp.Ring(), jaxcp.AllGather()):
        for devices in (DEVICES, 1):
            order = strategy.layout.order(tokens, devices)
            mesh = Mesh(jax.devices()[:devices], ("seq",))
            name = label(strategy)
            running[name, devices] = contender(name, layer_of(strategy, order), mesh, order, arrays)
    seconds: dict[tuple[str, int, str], list[float]] = {}
    for _ in range(rounds + 1):  # the first one warms up
        for (name, devices), one in running.items():
            for which in ("forward", "both"):
                start = time.perf_counter()
                getattr(one, which)()
                seconds.setdefault((name, devices, which), []).append(time.perf_counter() - start)
    rows = [
        {
            "name": name,
            "pass": which,
            "ms": 1e3 * statistics.median(seconds[name, DEVICES, which][1:]),
            "ms_one": 1e3 * statistics.median(seconds[name, 1, which][1:]),
        }
        for name in dict.fromkeys(name for name, _ in running)
        for which in ("forward", "both")
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*(int(x) for x in sys.argv[1:]))
