# SPDX-License-Identifier: Apache-2.0
"""The command line: each command builds a few values and calls one public function.

Nothing here imports jax at module level, so that `--help` is quick.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from jaxcp import __version__
from jaxcp.accelerators import choose_cpu
from jaxcp.checkpoints import NEEDLE
from jaxcp.cli.terminal import ABOUT, one_line_errors, read_lines, read_prompt

NEW_TOKENS, CHAT_NEW_TOKENS = 256, 128
CHAT_TOKENS = 32_768
MOST_EMULATED = 512
"""CPU devices that a command makes; so many still start in seconds, and share a few cores."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Shards over the devices. On a machine with CPUs only, as many are emulated as it takes."""

    seq: int = 1
    """Shards of the sequence."""
    model: int = 1
    """Shards of heads and widths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options of sampling. Greedy unless the temperature is positive."""

    max_new_tokens: int | None = None
    """Default: 256 (chat: 128), or as many as there is room for."""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    """Go on where the checkpoint's eos_token_id would end an answer."""

    @property
    def stop_tokens(self) -> tuple[int, ...] | None:
        return () if self.ignore_eos else None


def _check(max_len: int | None, sampling: Sampling) -> None:
    """Refuse what nothing could honour before a model is loaded."""
    _at_least_one(max_len=max_len, max_new_tokens=sampling.max_new_tokens)
    if not 0 <= sampling.seed < 2**32:  # jax would drop the higher bits
        raise ValueError(f"--seed must be in 0..{2**32 - 1}; got {sampling.seed}")


def _at_least_one(**options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")


def demo(out: pathlib.Path = pathlib.Path("out/demo"), *, smoke: bool = False) -> None:
    """The main job on what the package ships: long texts over eight emulated devices, training.

    Args:
        out: folder for the two pictures, the table and the training run.
        smoke: the same path with short contexts and seconds of training.
    """
    from jaxcp.cli.demo import run

    run(out, smoke=smoke)


def generate(
    *,
    prompt: str | None = None,
    prompt_file: pathlib.Path | None = None,
    checkpoint: pathlib.Path = NEEDLE,
    max_len: int | None = None,
    devices: OmitArgPrefixes[Devices] = Devices(),
    sampling: OmitArgPrefixes[Sampling] = Sampling(),
) -> None:
    """Continue a text: the prompt's, a file's, or what is piped in.

    Args:
        prompt: the text, or what follows the text of the file; -: standard input.
        prompt_file: a UTF-8 file; -: standard input.
        checkpoint: folder with config.json, *.safetensors and tokenizer.json.
        max_len: tokens that fit, prompt and answer; default: just enough.
        devices: how the devices are used.
        sampling: how tokens are chosen.
    """
    _check(max_len, sampling)
    text = read_prompt(prompt, prompt_file)
    with _loaded(checkpoint, devices) as (model, tokenizer):
        from jaxcp.inference import Engine

        tokens = len(tokenizer.encode(text))
        if max_len is None:
            limit = _positions(model, tokens + (sampling.max_new_tokens or NEW_TOKENS))
            if tokens > limit:
                raise ValueError(f"the prompt has {tokens:,} tokens; the model takes {limit:,}")
            max_len = limit
        engine = Engine(model, tokenizer, max_len=max_len, stop_tokens=sampling.stop_tokens)
        session = engine.session(seed=sampling.seed)
        _answer(session, text, sampling)


def chat(
    *,
    checkpoint: pathlib.Path = NEEDLE,
    max_len: int | None = None,
    devices: OmitArgPrefixes[Devices] = Devices(),
    sampling: OmitArgPrefixes[Sampling] = Sampling(),
) -> None:
    """Talk turn by turn; each turn prefills only itself. An empty line or end of file ends it.

    Args:
        checkpoint: folder with config.json, *.safetensors and tokenizer.json.
        max_len: tokens that the conversation may hold; default: 32,768, or as many as the model
            has positions.
        devices: how the devices are used.
        sampling: how tokens are chosen.
    """
    _check(max_len, sampling)
    with _loaded(checkpoint, devices) as (model, tokenizer):
        from jaxcp.inference import Engine

        if max_len is None:
            max_len = _positions(model, CHAT_TOKENS)
        engine = Engine(model, tokenizer, max_len=max_len, stop_tokens=sampling.stop_tokens)
        session = engine.session(seed=sampling.seed)
        for text in read_lines():
            try:
                _answer(session, text, sampling, CHAT_NEW_TOKENS)
            except ValueError as error:
                print(f"! {error}", file=sys.stderr)


def train(
    run: Annotated[str, tyro.conf.Positional],
    *,
    out: pathlib.Path | None = None,
    max_seconds: float | None = None,
    export_dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Run a config: a name, or the path of a Python file with `config() -> TrainConfig`.

    Run it again to go on from its newest checkpoint. A finished run leaves a checkpoint in
    OUT/model that `generate`, `chat` and `eval` read, and OUT/loss.png.

    Args:
        run: a path, or a name: of configs/NAME.py here, or one that comes with jaxcp:
            needle, gpt_cpu, gpt2_124m.
        out: folder of the run; default: the config's.
        max_seconds: stop after so long, saved.
        export_dtype: number format of the exported weights.
    """
    from jaxcp.training.config import load_run

    config = load_run(run)
    if out is not None:
        config = dataclasses.replace(config, out_dir=out)
    if max_seconds is not None:
        config = dataclasses.replace(config, max_seconds=max_seconds)
    _want_devices(config.mesh.size)
    from jaxcp.evaluate.pictures import draw_if_possible
    from jaxcp.training import plot_loss
    from jaxcp.training import train as run_training
    from jaxcp.training.export import export

    result = run_training(config, progress=True)
    folder = pathlib.Path(config.out_dir)
    picture = draw_if_possible(plot_loss, result.metrics_path, folder / "loss.png")
    print(f"step {result.steps}, loss {result.final_loss:.4f}, {picture}")
    if result.steps >= config.steps:
        print(f"checkpoint: {export(result, config, folder / 'model', dtype=export_dtype)}")


def tune(
    *,
    op: Literal["flash_attention", "grouped_matmul", "decode_attention"],
    target: Literal["sm_120", "h200", "v5e", "v5p", "v6e", "tpu7x"],
    part: str | None = None,
    shape: tuple[str, ...] = (),
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    max_seconds: float = 300,
    json_file: Annotated[pathlib.Path | None, tyro.conf.arg(name="json")] = None,
    write: bool = False,
) -> None:
    """Find block sizes, warps and stages of a kernel, and print the row for its tuning.py.

    By time when the device is here, else by what the compiled kernel costs: bundles on a TPU;
    on a GPU issue slots, with spills and too much shared memory refused. Nothing needs to be
    there for that but `pip install jaxcp[tune]`, and running it twice gives the same row.

    Args:
        op: the operation.
        target: the chip. Rows of sm_120 are those of any NVIDIA GPU without rows of its own.
        part: a name in the first column of the table, such as mosaic_backward; default: forward.
        shape: sizes other than the default, such as head_dim=64 tokens=4096.
        dtype: of the operands.
        max_seconds: limit of the search; what it leaves untried is said.
        json_file: write everything that was tried into this file.
        write: put the row into the table of the installed package.
    """
    from jaxcp.tune import search
    from jaxcp.tune.show import progress, show

    with progress() as step:
        result = search(
            op, target, part=part, shape=_sizes(shape), dtype=dtype, max_seconds=max_seconds,
            progress=step,
        )  # fmt: skip
    show(result)
    if json_file is not None:
        json_file.write_text(json.dumps(result.as_json(), indent=1) + "\n")
    if write:
        print("written" if result.row.write() else "the table has it")


def _sizes(shape: tuple[str, ...]) -> dict[str, int]:
    pairs = [text.partition("=") for text in shape]
    if wrong := [
        text for text, (_, _, size) in zip(shape, pairs, strict=True) if not size.isdigit()
    ]:
        raise ValueError(f"--shape takes name=size, such as head_dim=64; got {' '.join(wrong)}")
    return {name: int(size) for name, _, size in pairs}


def quantize(
    source: Annotated[pathlib.Path, tyro.conf.Positional],
    out: Annotated[pathlib.Path, tyro.conf.Positional],
    *,
    weights: Literal["int8", "fp8", "nvfp4", "mxfp8"],
    only: Literal["experts", "all"] = "all",
) -> None:
    """Write a checkpoint with quantized weights, which all commands read.

    One tensor at a time: the model need not fit into memory.

    Args:
        source: folder with config.json and *.safetensors.
        out: a new folder.
        weights: their format.
        only: "experts": routed experts alone; "all": every weight that its layer can use so.
    """
    from jaxcp.weights.quantizing import quantize as write_quantized

    result = write_quantized(source, out, weights=weights, only=only)
    print(
        f"{len(result.quantized)} tensors in {weights}, {len(result.skipped)} could not be; "
        f"{result.bytes_before / 2**20:,.2f} -> {result.bytes_after / 2**20:,.2f} MiB: {out}"
    )


def eval_needle(
    *,
    checkpoint: pathlib.Path = NEEDLE,
    lengths: tuple[int, ...] = (2_048, 8_192, 32_768, 131_072),
    needles: int = 20,
    haystacks: int = 1,
    seed: int = 0,
    out: pathlib.Path = pathlib.Path("out/needle"),
    devices: OmitArgPrefixes[Devices] = Devices(),
) -> None:
    """Find needles in real text; prints exact match and draws a heat map (length x depth).

    Args:
        checkpoint: folder with config.json, *.safetensors and tokenizer.json.
        lengths: haystacks, in bytes.
        needles: needles, and questions, a haystack.
        haystacks: haystacks a length.
        seed: of the haystacks.
        out: folder for needle.png and needle.json.
        devices: how the devices are used.
    """
    if not lengths:
        raise ValueError("--lengths needs one number or more")
    _at_least_one(needles=needles, haystacks=haystacks)
    with _loaded(checkpoint, devices) as (model, tokenizer):
        from rich.progress import Progress

        from jaxcp.evaluate.needle import evaluate_needle, plot_heat_map
        from jaxcp.evaluate.pictures import draw_if_possible

        with Progress(transient=True) as bar:
            task = bar.add_task("needles", total=len(lengths) * haystacks * needles)
            result = evaluate_needle(
                model, tokenizer, lengths=lengths, needles=needles, haystacks=haystacks, seed=seed,
                on_answer=lambda _: bar.advance(task),
            )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    picture = draw_if_possible(plot_heat_map, result, out / "needle.png")
    (out / "needle.json").write_text(json.dumps(result.as_json(), indent=1))
    for length in result.lengths():
        asked = sum(answer.length == length for answer in result.answers)
        print(f"{length:>9,} bytes  {100 * result.accuracy(length):6.2f} % of {asked}")
    print(picture)


@contextlib.contextmanager
def _loaded(checkpoint: pathlib.Path, devices: Devices):
    """Load a checkpoint's model and tokenizer on a mesh over the devices asked for."""
    from jaxcp.mesh import MeshConfig

    config = MeshConfig(seq=devices.seq, model=devices.model)
    _want_devices(config.size)
    import jax

    from jaxcp.weights import load

    with jax.set_mesh(config.make(jax.devices()[: config.size])):
        model, tokenizer = load(checkpoint)
        if tokenizer is None:
            raise ValueError(f"{checkpoint} has no tokenizer.json; the command line talks in text")
        yield model, tokenizer


def _want_devices(count: int) -> None:
    """Emulate `count` devices where there are only CPUs; accelerators stay as they are."""
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", min(count, MOST_EMULATED))
    except RuntimeError:  # jax runs already, with the devices that it has
        pass
    if jax.default_backend() == "cpu" and count > jax.device_count():
        raise ValueError(
            f"needed {count:,} devices; here are CPUs, which emulate {jax.device_count()} at most"
        )


def _positions(model, at_most: int) -> int:
    """The positions of the model, or `at_most`, whichever is less."""
    return min(at_most, getattr(model.config, "max_positions", at_most))


def _answer(session, text: str, sampling: Sampling, default: int = NEW_TOKENS) -> None:
    count = sampling.max_new_tokens
    if count is None:
        answered = session.stats.turns > 0  # its last token is not in the cache yet
        used = session.stats.tokens + answered + len(session.engine.tokenizer.encode(text))
        count = max(1, min(default, session.engine.max_len - used + 1))
    for piece in session.send(
        text, max_new_tokens=count, temperature=sampling.temperature,
        top_k=sampling.top_k, top_p=sampling.top_p,
    ):  # fmt: skip
        print(piece, end="", flush=True)
    stats = session.stats
    print(
        f"\n[{stats.prefilled:,} tokens prefilled in {stats.prefill_seconds:.2f} s, "
        f"{stats.reused:,} reused; "
        f"{stats.generated} generated, {stats.decode_tokens_per_second:.1f} a second; "
        f"{stats.cache_bytes_per_device / 2**20:.1f} MiB of cache a device]",
        file=sys.stderr,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `jaxcp`: run the command that the arguments (default: the process's) name."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"jaxcp {__version__}")
        return
    app, evaluations = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()
    for command in (demo, generate, chat, train, tune, quantize):
        app.command(command)
    evaluations.command(name="needle")(eval_needle)
    app.command(evaluations, name="eval", help="Measure what a checkpoint can do.")
    with one_line_errors():
        choose_cpu()
        app.cli(prog="jaxcp", description=ABOUT, args=arguments)


if __name__ == "__main__":
    main()
