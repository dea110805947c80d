# SPDX-License-Identifier: Apache-2.0
"""The PyTorch peers: one rank of a gloo group, a process each.

python -m benchmarks.cp.torch_contenders PACKAGE TOKENS RANK PORT     # then: commands on stdin
"""

import functools
import importlib.util
import os
import sys
import types

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist

from benchmarks.cp import flash_attn_stub, problem
from benchmarks.cp.problem import Contender

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def contender(name, attend, order, arrays, alone, *, dtype="float32", gradients=True, note=""):
    """Make a contender of `attend(q, k, v)` on this rank's tokens; `order`: that over all ranks."""
    rank = dist.get_rank()
    tokens = np.split(order, problem.RANKS)[rank]
    local = [torch.from_numpy(x[:, tokens]).to(FLOATS[dtype]) for x in arrays.values()]
    *qkv, dout = (x.contiguous() for x in local)

    def forward():
        with torch.no_grad():
            return attend(*qkv)

    def both():
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    def result():
        results = both() if gradients else [forward()]
        return {n: gathered(x, order) for n, x in zip(problem.NAMES, results, strict=False)}

    def on_one():
        whole = (torch.from_numpy(arrays[x]).to(FLOATS[dtype]) for x in "qkv")
        with torch.no_grad():
            return host(alone(*whole))

    return Contender(name, forward, both if gradients else None, result, on_one, dtype, note)


def gathered(x, order):
    """Every rank's rows, in natural order."""
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(problem.RANKS)
    ]
    dist.all_gather(parts, x.contiguous())
    return host(torch.cat(parts, 1))[:, np.argsort(order)]


def host(x):
    x = x.contiguous()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def zigzag(tokens):
    pieces = np.arange(tokens).reshape(2 * problem.RANKS, -1)
    return np.concatenate(
        [pieces[[r, 2 * problem.RANKS - 1 - r]] for r in range(problem.RANKS)]
    ).reshape(-1)


def bare(package):
    """Import from a package without running its `__init__`, which wants what is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"No module named {package!r}")
    module = types.ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[package] = module


def ring_flash_attn(arrays, tokens):
    flash_attn_stub.install()
    bare("ring_flash_attn")
    from ring_flash_attn.ring_flash_attn import ring_flash_attn_func
    from ring_flash_attn.zigzag_ring_flash_attn import zigzag_ring_flash_attn_func

    def alone(q, k, v):
        scale = problem.HEAD_DIM**-0.5
        return flash_attn_stub._flash_attn_forward(q, k, v, 0.0, scale, True)[0]

    kinds = {
        "zigzag": (zigzag_ring_flash_attn_func, zigzag(tokens)),
        "ring": (ring_flash_attn_func, np.arange(tokens)),
    }
    for kind, (function, order) in kinds.items():
        attend = functools.partial(function, causal=True)
        for dtype in FLOATS:
            whole = dtype == "bfloat16"
            note = "PyTorch's CPU kernel stands for flash_attn" + (
                "" if whole else "; float32 gradients are wrong in 0.1.8, which keeps no copy"
            )
            yield contender(
                f"ring-flash-attn {kind}, {dtype}",
                attend,
                order,
                arrays,
                alone,
                dtype=dtype,
                gradients=whole,
                note=note,
            )


def ring_attention_pytorch(arrays, tokens):
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn as attend

    bucket = min(512, tokens // problem.RANKS)

    def alone(q, k, v):
        return attend(q, k, v, causal=True, bucket_size=bucket)

    striped = np.arange(tokens).reshape(bucket, -1).T.reshape(-1)
    for name, order in (("ring", np.arange(tokens)), ("striped", striped)):
        run = functools.partial(
            attend,
            causal=True,
            bucket_size=bucket,
            ring_reduce_col=True,
            striped_ring_attn=name == "striped",
        )
        note = "in 0.5.20 the gradients of k and of v both come out as their sum"
        yield contender(f"ring-attention-pytorch {name}", run, order, arrays, alone, note=note)


def yunchang(arrays, tokens):
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    def alone(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        backend = torch.nn.attention.SDPBackend.MATH
        with torch.nn.attention.sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True)
        return out.transpose(1, 2)

    for ulysses in (4, 2, 1):
        ring = problem.RANKS // ulysses
        set_seq_parallel_pg(ulysses, ring, dist.get_rank(), problem.RANKS)
        attend = LongContextAttention(ring_impl_type="basic", attn_type=AttnType.TORCH_MATH)
        name = f"yunchang ulysses {ulysses} x ring {ring}"
        note = "TORCH_MATH, which has no backward"
        run = functools.partial(attend, causal=True)
        yield contender(name, run, np.arange(tokens), arrays, alone, gradients=False, note=note)


GROUPS = {
    "ring_flash_attn": ring_flash_attn,
    "ring_attention_pytorch": ring_attention_pytorch,
    "yunchang": yunchang,
}


def main(group: str, tokens: int, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=problem.RANKS)
    contenders = GROUPS[group](problem.inputs(tokens), tokens)
    problem.serve(contenders, speaks=rank == 0, barrier=dist.barrier)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], *(int(x) for x in sys.argv[2:]))
