# SPDX-License-Identifier: Apache-2.0
"""Ask about a long text whose cache is spread over all devices, then ask again.

python examples/long_context.py --smoke                       # 8 emulated CPU devices
python examples/long_context.py --context 131072              # needles hidden in Python's docs
python examples/long_context.py --checkpoint DIR --text book.txt --question 'Who is Pierre?'
python examples/long_context.py --hosts 4 --context 131072    # on each host of a TPU slice
python examples/long_context.py --compile-only v6e:2x4 --context 131072
"""

import dataclasses
import pathlib

import jax
import tyro

import jaxcp
from jaxcp.checkpoints import NEEDLE
from jaxcp.cli.several import Processes, one_of
from jaxcp.cli.terminal import one_line_errors
from jaxcp.compile import compile_for, decode_program, parse_target, prefill_program
from jaxcp.data.haystack import DIGITS, QUESTION, make_haystack
from jaxcp.text.tokenizer import read_text


@dataclasses.dataclass
class Args:
    checkpoint: pathlib.Path = NEEDLE
    text: pathlib.Path | None = None  # a UTF-8 file; default: needles among Python's own docs
    question: tuple[str, ...] = ()  # one or more, asked one after the other
    context: int = 32_768  # bytes of text where none is given
    max_new_tokens: int = 256
    dtype: str | None = None  # such as bfloat16; default: the checkpoint's
    hosts: int = 1  # processes that run this, one a host
    smoke: bool = False  # a short text, on 8 emulated CPU devices
    compile_only: str | None = None  # a target: v6e:2x4, tpu7x:2x2x1, rtx-pro-6000:8


def material(args):
    """The text, and questions with the answers that are known."""
    if args.text is not None:
        return read_text(args.text), [(question, None) for question in args.question]
    haystack = make_haystack(args.context, needles=8, seed=0)
    asked = [(QUESTION.format(key=haystack.keys[i]), haystack.values[i]) for i in (3, 6)]
    return haystack.text, [(question, f"{value:0{DIGITS}d}") for question, value in asked]


def run(args):
    text, questions = material(args)
    say = print if jax.process_index() == 0 else lambda *_, **__: None
    with jax.set_mesh(jaxcp.make_mesh(seq=jax.device_count())):
        model, tokenizer = jaxcp.load(args.checkpoint, dtype=args.dtype)
        prompts = [text + questions[0][0], *(question for question, _ in questions[1:])]
        sizes = [len(tokenizer.encode(prompt)) + args.max_new_tokens for prompt in prompts]
        session = jaxcp.Engine(model, tokenizer, max_len=sum(sizes)).session()
        for prompt, (question, known) in zip(prompts, questions, strict=True):
            say(f"> {question.strip()}")
            for piece in session.send(prompt, max_new_tokens=args.max_new_tokens):
                say(piece, end="", flush=True)
            stats = session.stats
            say(f"   (expected {known})" if known else "")
            say(f"  prefilled {stats.prefilled:,} tokens in {stats.prefill_seconds:.2f} s", end="")
            say(f", reused {stats.reused:,}; {stats.decode_tokens_per_second:.1f} tokens/s", end="")
            say(f"; cache {stats.cache_bytes_per_device / 2**20:.1f} MiB a device")


def compile_only(args):
    target = parse_target(args.compile_only)
    mesh = target.mesh(seq=target.size)
    config = jaxcp.load_config(args.checkpoint)
    model = jaxcp.abstract_model(dataclasses.replace(config, dtype=args.dtype or config.dtype))
    length = args.context + args.max_new_tokens
    print(f"prefill of {args.context:,} tokens on {target}")
    print(compile_for(*prefill_program(model, mesh, tokens=args.context, max_len=length), mesh))
    print("\none step of decoding")
    print(compile_for(*decode_program(model, mesh, max_len=length), mesh))


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    jax.config.update("jax_num_cpu_devices", 8)  # where there is no accelerator
    if args.smoke or args.compile_only:
        jaxcp.emulate_devices(8)  # even where there is one
    if args.smoke:
        args = dataclasses.replace(args, context=2048)
    if args.text is None:
        args.max_new_tokens = DIGITS
    elif not args.question:
        raise SystemExit("--text needs a --question")
    # JAXCP_DEBUG=1 shows where errors come from
    with one_line_errors(), one_of(Processes(distributed=args.hosts > 1)):
        compile_only(args) if args.compile_only else run(args)
