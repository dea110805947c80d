# SPDX-License-Identifier: Apache-2.0
"""Train a byte-level GPT whose sequence lies on several devices; run it again and it resumes.

python examples/train_gpt.py --smoke                        # 8 emulated CPU devices, a minute
python examples/train_gpt.py --data 'books/*.txt'           # GPUs, or one TPU host
python examples/train_gpt.py --data 'books/*.txt' --hosts 4 # on each host of a TPU slice
python examples/train_gpt.py --compile-only v6e:2x4 --layers 12 --width 768 --seq-len 131072
"""

import dataclasses

import jax
import tyro

import jaxcp
from jaxcp.cli.several import Processes, one_of
from jaxcp.cli.terminal import one_line_errors
from jaxcp.compile import compile_for, parse_target
from jaxcp.training import TextSource, train
from jaxcp.training.step import abstract_inputs, make_step


@dataclasses.dataclass
class Args:
    data: str | None = None  # a glob of UTF-8 text files; default: Python's own documentation
    out_dir: str = "runs/train_gpt"
    layers: int = 6
    width: int = 384
    seq_len: int = 4096
    batch_size: int = 8
    steps: int = 2000
    data_shards: int = 2  # devices along the batch; the sequence is over the others
    dtype: str = "bfloat16"  # of the computation; parameters are float32
    hosts: int = 1  # processes that run this, one a host
    smoke: bool = False  # tiny, on 8 emulated CPU devices
    compile_only: str | None = None  # a target: v6e:2x4, tpu7x:2x2x1, rtx-pro-6000:8


def configure(args, devices):
    """The run on so many devices."""
    model = jaxcp.GPTConfig(
        vocab_size=256,
        max_positions=args.seq_len,
        num_layers=args.layers,
        num_heads=max(1, args.width // 64),
        embed_dim=args.width,
        dtype=args.dtype,
        remat=True,
    )
    return jaxcp.TrainConfig(
        model=model,
        mesh=jaxcp.MeshConfig(data=args.data_shards, seq=devices // args.data_shards),
        strategy=jaxcp.Ring(),
        data=TextSource(path=args.data),
        out_dir=args.out_dir,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        steps=args.steps,
        log_every=max(1, args.steps // 100),
    )


def run(args):
    config = configure(args, jax.device_count())
    result = train(config, progress=True)
    if jax.process_index() != 0:
        return
    since = "" if result.resumed_from is None else f", resumed from {result.resumed_from}"
    print(f"step {result.steps}{since}: loss {result.final_loss:.3f} after {result.seconds:.0f} s")
    print(f"metrics in {result.metrics_path}, checkpoint in {result.checkpoint_path}")


def compile_only(args):
    target = parse_target(args.compile_only)
    config = configure(args, target.size)
    mesh = target.mesh(data=config.mesh.data, seq=config.mesh.seq)
    step = make_step(
        config.model, config.strategy, config.optimizer, config.steps, config.loss_chunk
    )
    print(compile_for(step, abstract_inputs(config, mesh), mesh))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    jax.config.update("jax_num_cpu_devices", 8)  # where there is no accelerator
    if args.smoke or args.compile_only:
        jaxcp.emulate_devices(8)  # even where there is one
    if args.smoke:
        small = dict(layers=2, width=64, seq_len=256, batch_size=4, steps=20, dtype="float32")
        args = dataclasses.replace(args, **small)
    # JAXCP_DEBUG=1 shows where errors come from
    with one_line_errors(), one_of(Processes(distributed=args.hosts > 1)):
        compile_only(args) if args.compile_only else run(args)
