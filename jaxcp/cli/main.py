# SPDX-License-Identifier: Apache-2.0
"""The command line: each command builds a few values and calls one public function.

No file of commands imports jax at module level, so that `--help` is quick.
"""

import logging
import sys
from collections.abc import Sequence

import tyro

from jaxcp import __version__
from jaxcp.accelerators import choose_cpu
from jaxcp.cli.corpus import prepare
from jaxcp.cli.load import eval_load
from jaxcp.cli.measure import demo, eval_agent, eval_needle
from jaxcp.cli.perplexity import eval_perplexity
from jaxcp.cli.prepare import quantize, tune
from jaxcp.cli.serve import serve
from jaxcp.cli.talk import chat, generate
from jaxcp.cli.terminal import ABOUT, one_line_errors
from jaxcp.cli.train import plot, print_fields, train


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `jaxcp`: run the command that the arguments (default: the process's) name."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"jaxcp {__version__}")
        return
    app, evaluations = tyro.extras.SubcommandApp(), tyro.extras.SubcommandApp()
    for command in (demo, generate, chat, serve, prepare, train, plot, tune, quantize):
        app.command(command)
    evaluations.command(name="needle")(eval_needle)
    evaluations.command(name="perplexity")(eval_perplexity)
    evaluations.command(name="agent")(eval_agent)
    evaluations.command(name="load")(eval_load)
    app.command(evaluations, name="eval", help="Measure what a checkpoint can do.")
    with one_line_errors():
        choose_cpu()
        if arguments[:1] == ["train"] and {"-h", "--help"} & set(arguments):
            print_fields(arguments[1:])
        _check_each_once(arguments)
        app.cli(prog="jaxcp", description=ABOUT, args=arguments)


def _check_each_once(arguments: Sequence[str]) -> None:
    """Refuse an option that comes twice: of two the parser drops the first without a word."""
    seen = set()
    options = (x.partition("=")[0] for x in arguments if x.startswith("--") and len(x) > 2)
    for name in (x.replace("_", "-") for x in options):
        if name in seen:
            raise ValueError(
                f"{name} is there twice; give it once, with all of its values behind it "
                "(--set steps=3 batch_size=2)"
            )
        seen.add(name)


if __name__ == "__main__":
    main()
