# SPDX-License-Identifier: Apache-2.0
"""Input and errors of commands: in this process, unless a pipe or an exit code is the point."""

import fnmatch
import io
import os
import re
import subprocess
import sys

import pytest
from flax import nnx
from pairwise import pairwise

import jaxcp
from jaxcp import accelerators
from jaxcp.cli import terminal
from jaxcp.cli.main import main
from jaxcp.text.tokenizer import byte_level

POSITIONS = 32


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model of 32 positions and 2 heads, which answers in bytes."""
    config = jaxcp.GPTConfig(
        vocab_size=256, max_positions=POSITIONS, num_layers=1, num_heads=2, embed_dim=16
    )
    folder = tmp_path_factory.mktemp("short") / "model"
    jaxcp.save(jaxcp.GPT(config, rngs=nnx.Rngs(0)), folder, byte_level())
    return folder


GENERATED = {
    "--seq": (1, 2),
    "--model": (1, 2),
    "--temperature": (0.0, 0.9),
    "--top-k": (None, 7),
    "--top-p": (None, 0.6),
    "--max-len": (None, 32),
    "command": ("generate", "chat"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=str([*c.values()]), marks=[pytest.mark.slow] * (i > 1))
        for i, c in enumerate(pairwise(GENERATED))
    ],
)
def test_options_say_in_a_command_what_they_say_in_python(case, capsys, monkeypatch, short):
    case = dict(case)
    sampling = {"temperature": case["--temperature"], "top_k": case["--top-k"]}
    model, tokenizer = jaxcp.load(short)
    session = jaxcp.Engine(model, tokenizer, max_len=POSITIONS).session(seed=3)
    said = session.send("hello", max_new_tokens=6, top_p=case["--top-p"] or 1.0, **sampling)
    expected = "".join(said)
    pipe(monkeypatch, b"hello" + b"\n" * (case["command"] == "chat"))
    options = [case.pop("command"), "--checkpoint", short, "--max-new-tokens", 6, "--seed", 3]
    for name, value in case.items():
        options += [] if value is None else [name, value]
    code, out, errors = run(capsys, *options)
    assert code == 0 and out.rstrip("\n") == expected.rstrip("\n"), errors


class Terminal(io.StringIO):
    def isatty(self):
        return True


def pipe(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def run(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    code = 0
    try:
        main([str(x) for x in arguments])
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def prefilled(errors):
    return [int(n) for n in re.findall(r"\[(\d+) tokens prefilled", errors)]


def generated(errors):
    return [int(n) for n in re.findall(r"(\d+) generated", errors)]


def test_generate_takes_its_prompt_from_anywhere(capsys, monkeypatch, short, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("é\r\n".encode())
    ways = {
        "piped": ([], b"The cat"),
        "prompt -": (["--prompt", "-"], b"The cat"),
        "file -": (["--prompt-file", "-", "--prompt", "cat"], b"The "),
        "prompt alone": (["--prompt", "The cat"], b"never read"),
        "file, then -": (["--prompt-file", file, "--prompt", "-"], b"cat"),
    }
    answers = {}
    for way, (arguments, piped) in ways.items():
        pipe(monkeypatch, piped)
        code, answers[way], errors = run(capsys, "generate", "--checkpoint", short, *arguments)
        assert code == 0 and prefilled(errors) == [7], (way, errors)
    assert len({answers[way] for way in list(ways)[:4]}) == 1


@pytest.mark.parametrize(
    ("arguments", "piped", "message"),
    [
        ([], None, "no prompt: give --prompt TEXT, --prompt-file FILE, or pipe text in"),
        ([], b"", "the prompt is empty: give"),
        (["--prompt", ""], b"x", "the prompt is empty: give"),
        ([], b"caf\xe9", "standard input has byte 0xe9 at offset 3"),
        (["--prompt", "-", "--prompt-file", "-"], b"x", "standard input can be read once"),
        (["--prompt-file", "."], b"", "Is a directory"),
    ],
)
def test_generate_without_a_prompt_says_how_to_give_one(
    capsys, monkeypatch, arguments, piped, message
):
    pipe(monkeypatch, piped or b"")
    if piped is None:
        monkeypatch.setattr(sys, "stdin", Terminal())
    code, out, errors = run(capsys, "generate", *arguments)
    assert code == 1 and not out and len(errors.splitlines()) == 1
    assert errors.startswith("jaxcp: ") and message in errors


def test_a_turn_takes_what_room_the_model_has(capsys, monkeypatch, short):
    """256 and 32,768 are defaults for models that have as many positions."""
    code, _, errors = run(capsys, "generate", "--checkpoint", short, "--prompt", "x" * 12)
    assert code == 0 and generated(errors) == [POSITIONS - 12 + 1]
    pipe(monkeypatch, b"hello\nmore\n")
    code, _, errors = run(capsys, "chat", "--checkpoint", short, "--max-new-tokens", 5)
    assert code == 0 and prefilled(errors) == [5, 1 + 4] and generated(errors) == [5, 5]
    pipe(monkeypatch, b"hello\nmore\n")
    code, _, errors = run(capsys, "chat", "--checkpoint", short)
    assert code == 0 and generated(errors) == [POSITIONS - 5 + 1]
    assert "! the conversation would hold" in errors
    code, _, errors = run(capsys, "generate", "--checkpoint", short, "--prompt", "x" * 33)
    assert code == 1 and "the prompt has 33 tokens; the model takes 32" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--prompt", "x", "--seq", 0], "mesh axis seq must be at least 1; got 0"),
        (["chat", "--model", -2], "mesh axis model must be at least 1; got -2"),
        (["generate", "--prompt", "x", "--seq", 16], "needed 16 devices; here are CPUs"),
        (["eval", "needle", "--seq", 10**9], "needed 1,000,000,000 devices; here are CPUs"),
        (["generate", "--prompt", "x", "--max-new-tokens", 0], "--max-new-tokens must be at least"),
        (["generate", "--prompt", "x", "--max-len", 0], "--max-len must be at least 1; got 0"),
        (["chat", "--max-len", -1], "--max-len must be at least 1; got -1"),
        (["generate", "--prompt", "x", "--seed", 2**32], "--seed must be in 0..4294967295"),
        (["chat", "--seed", -1], "--seed must be in 0..4294967295"),
        (["eval", "needle", "--needles", 0], "--needles must be at least 1"),
        (["eval", "needle", "--haystacks", -1], "--haystacks must be at least 1"),
        (["eval", "needle", "--lengths"], "--lengths needs one number or more"),
        (
            ["tune", "--op", "flash_attention", "--target", "v6e", "--max-seconds", "nan"],
            "max_seconds must be positive and finite; got nan",
        ),
        (
            ["generate", "--prompt", "x", "--model", 4],
            "divides layers.0.attention.k (128, 2, 64) by model=4: it has 2 kv_heads; "
            "the model can have model=1 or 2",
        ),
        (["chat", "--checkpoint", "org/name"], "A hub id is no path: fetch it (hf download"),
    ],
)
def test_what_is_out_of_range_is_said_in_a_line(capsys, monkeypatch, arguments, message):
    pipe(monkeypatch, b"")
    code, out, errors = run(capsys, *arguments)
    errors = errors.lstrip()  # below a progress bar
    assert code == 1 and not out.strip() and len(errors.splitlines()) == 1, errors
    assert errors.startswith("jaxcp: ") and message in errors and len(errors) < 250


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (TypeError("a bytes-like\nobject"), "TypeError: a bytes-like (JAXCP_DEBUG=1 shows", 1),
        (RuntimeError("x" * 1000), f"RuntimeError: {'x' * 300}... (JAXCP_DEBUG=1 shows", 1),
        (FloatingPointError("step 3 has loss nan"), "step 3 has loss nan", 1),
        (MemoryError(), "out of memory (JAXCP_DEBUG=1 shows", 1),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device", 1),
        (KeyError("k"), "KeyError: 'k' (JAXCP_DEBUG=1 shows", 1),
        (ValueError(), "ValueError: no message (JAXCP_DEBUG=1 shows", 1),
        (ValueError("two\nlines that we wrote"), "two\nlines that we wrote", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_every_error_ends_a_command_without_a_traceback(capsys, monkeypatch, error, said, code):
    def fail(*_, **__):
        raise error

    monkeypatch.delenv(terminal.DEBUG, raising=False)
    monkeypatch.setattr("jaxcp.weights.quantizing.quantize", fail)
    arguments = ["quantize", "a", "b", "--weights", "int8"]
    ended, out, errors = run(capsys, *arguments)
    assert ended == code and not out and f"jaxcp: {said}" in errors
    assert "Traceback" not in errors
    monkeypatch.setenv(terminal.DEBUG, "1")
    with pytest.raises(SystemExit if code == 130 else type(error)):
        main(arguments)


def test_chat_prompts_people_alone(capsys, monkeypatch, short):
    said = ["hello", "", "never"]
    options = ["--checkpoint", short, "--max-new-tokens", 1]
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": (asked.append(prompt), said.pop(0))[1])
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert run(capsys, "chat", *options)[0] == 0 and asked == ["", ""]  # stdout is no terminal
    assert said == ["never"]
    said[:], asked[:] = ["hello", ""], []
    monkeypatch.setattr(sys, "stdout", Terminal())
    main(["chat", *map(str, options)])
    assert asked == ["> ", "> "]


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"jaxcp {jaxcp.__version__}\n", "")
    assert re.fullmatch(r"\d+\.\d+.*", jaxcp.__version__)
    assert "__version__" in dir(jaxcp) and "__version__" not in jaxcp.__all__


@pytest.fixture
def machine(monkeypatch):
    """A Linux machine with the device files and jax plugins given."""

    def has(*files, plugins=("xla_cuda13", "jax_plugins.xla_cuda13")):
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(accelerators, "plugins", lambda: set(plugins))
        monkeypatch.setattr(
            accelerators.glob, "glob", lambda pattern: fnmatch.filter(files, pattern)
        )

    return has


@pytest.mark.parametrize(
    "file",
    [
        "/dev/nvidia0", "/dev/nvidia11", "/dev/nvidiactl", "/dev/dxg", "/dev/accel0",
        "/dev/vfio/3", "/dev/vfio/devices/vfio0", "/dev/kfd", "/dev/nvhost-gpu",
    ],
)  # fmt: skip
def test_a_machine_with_an_accelerator_is_left_to_jax(machine, file):
    environment = {}
    machine(file)
    accelerators.choose_cpu(environment)
    assert not environment


def test_cpus_are_chosen_where_there_is_surely_nothing_else(machine, monkeypatch):
    environment = {}
    machine("/dev/null", "/dev/vfio/vfio", "/dev/vda")
    accelerators.choose_cpu(environment)
    assert environment == {"JAX_PLATFORMS": "cpu"}
    for name in accelerators.SAID:  # the user has spoken
        environment = {name: "tpu"}
        accelerators.choose_cpu(environment)
        assert environment == {name: "tpu"}
    machine(plugins=["xla_cuda13", "some_new_chip"])
    assert not accelerators.none_here()
    machine()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not accelerators.none_here()


def test_the_plugins_are_those_that_jax_finds():
    """What is installed here is known, so that commands are quiet here; nothing is imported."""
    code = (
        "import sys; from jaxcp import accelerators as a; print(sorted(a.plugins()), "
        "[name for name in ('jax', 'jax_plugins', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plugins, imported = done.stdout.split("] [")
    assert imported == "]\n"
    from importlib.metadata import entry_points

    assert all(point.value in plugins for point in entry_points(group="jax_plugins"))


def shell(command, **variables):
    """A real process, with neither JAX_PLATFORMS nor anything else of this suite's."""
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", terminal.DEBUG)}
    return subprocess.run(
        ["bash", "-c", command], env=kept | {"PYTHON": sys.executable} | variables,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_a_pipe_at_both_ends(short):
    """Only the answer is on stdout, only the line of numbers on stderr, whatever is installed."""
    done = shell(
        f"printf 'The cat' | $PYTHON -m jaxcp generate --checkpoint {short} --max-new-tokens 3"
    )
    assert done.returncode == 0 and prefilled(done.stderr) == [7], done.stderr
    if accelerators.none_here():
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    gone = shell(
        f"printf 'a\\nb\\n' | $PYTHON -m jaxcp chat --checkpoint {short} --max-new-tokens 2 "
        "| true; exit ${PIPESTATUS[1]}"
    )
    assert gone.returncode == 141 and not gone.stderr.strip(), gone.stderr


def test_an_interrupt_exits_as_shells_expect(tmp_path):
    (tmp_path / "slow.py").write_text(
        # a shell's background job ignores interrupts, and so would this child of one
        "import signal\n\ndef config():\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    signal.raise_signal(signal.SIGINT)\n"
    )
    done = shell(f"$PYTHON -m jaxcp train {tmp_path / 'slow.py'}")
    assert done.returncode == 130 and done.stderr.strip() == "jaxcp: interrupted"
