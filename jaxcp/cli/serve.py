# SPDX-License-Identifier: Apache-2.0
"""The command that listens on a port: `serve`."""

import logging
import os
import pathlib
from typing import Any

from tyro.conf import OmitArgPrefixes

from jaxcp.checkpoints import NEEDLE
from jaxcp.cli.devices import ONE_DEVICE, Devices, loaded
from jaxcp.cli.terminal import at_least_one

CONTEXT = 32_768
KEYS = "JAXCP_API_KEYS"


def serve(
    *,
    checkpoint: pathlib.Path = NEEDLE,
    devices: OmitArgPrefixes[Devices] = ONE_DEVICE,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_keys: pathlib.Path | None = None,
    max_len: int | None = None,
    max_rows: int = 16,
    max_requests: int = 256,
    pool_tokens: int | None = None,
    cache_dtype: str | None = None,
    host_memory: int | None = None,
    drafts: int = 0,
    max_seconds: float = 600.0,
    grace_seconds: float = 30.0,
    warm_up: bool = True,
    log_text: bool = False,
) -> None:
    """Serve a checkpoint to clients of OpenAI's and Anthropic's interfaces, and a page at /.

    SIGTERM and Ctrl-C: no new requests, answers finish, exit code 0.

    Args:
        checkpoint: folder with config.json, *.safetensors and tokenizer.json.
        devices: how the devices are used.
        host: the address to listen on; 0.0.0.0 for all of this machine.
        port: 0 takes a free one.
        name: by which clients ask for the model; default: the folder's.
        api_keys: a file with a key a line, one of which every request must bring; or the variable
            JAXCP_API_KEYS, with commas. Default: none is asked for.
        max_len: tokens of a prompt with its answer; default: 32,768, or as many as the model has
            positions.
        max_rows: answers that are computed at a time; more wait.
        max_requests: answers that run or wait; more are refused.
        pool_tokens: tokens that the pool has room for; default: see `jaxcp.Engine`.
        cache_dtype: int8 or float8_e4m3fn keep keys and values in 8 bits.
        host_memory: bytes of the host for pages that the pool has no room for any more.
        drafts: tokens guessed in a step at most, up to 7.
        max_seconds: an answer that takes longer ends with an error.
        grace_seconds: time to finish answers after SIGTERM; the process ends 5 s later at most.
        warm_up: compile all programs before listening, so that no request waits for that.
        log_text: write prompts and answers into the log.
    """
    at_least_one(max_len=max_len, max_rows=max_rows, max_requests=max_requests)
    try:
        from jaxcp.serve.config import ServeConfig
        from jaxcp.serve.process import Process
        from jaxcp.serve.process import serve as serve_until_the_end
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"serving needs {error.name}, which is not installed: pip install jaxcp[serve]"
        ) from error
    config = ServeConfig(
        name=name or checkpoint.resolve().name, host=host, port=port, api_keys=_keys(api_keys),
        max_requests=max_requests, request_seconds=max_seconds, grace_seconds=grace_seconds,
        log_text=log_text,
    )  # fmt: skip
    _log_requests()
    with loaded(checkpoint, devices) as (model, tokenizer):
        from jaxcp.inference import Engine

        _check_ids(model, tokenizer, checkpoint)
        if max_len is None:
            max_len = min(CONTEXT, getattr(model.config, "max_positions", CONTEXT))
        engine = Engine(
            model, tokenizer, max_len=max_len, max_rows=max_rows, pool_tokens=pool_tokens,
            cache_dtype=cache_dtype, host_memory=host_memory, drafts=drafts,
        )  # fmt: skip
        if warm_up:
            log = logging.getLogger("jaxcp.serve")
            log.info("compiling what requests need, for minutes maybe; see --no-warm-up")
            engine.warm_up()

        def ready(process: Process):
            print(f"{config.name}, {max_len:,} tokens, at {process.url}", flush=True)
            if not config.is_local and not config.api_keys:
                logging.warning("other machines may reach this server, and no key is asked for")

        serve_until_the_end(engine, config, ready)


def _check_ids(model: Any, tokenizer: Any, checkpoint: pathlib.Path) -> None:
    """Raise ValueError where a chat has tokens that the model has not: all of them would fail."""
    ids = () if tokenizer is None or tokenizer.chat is None else tokenizer.chat.stop_tokens
    size = model.config.vocab_size
    if too_large := [i for i in ids if i >= size]:
        raise ValueError(
            f"needed a tokenizer of the model's {size} ids; that of {checkpoint} ends a turn with "
            f"{too_large[0]}. Copy tokenizer.json and config.json from one checkpoint"
        )


def _keys(file: pathlib.Path | None) -> tuple[str, ...]:
    if file is None:
        given = os.environ.get(KEYS, "").split(",")
    else:
        given = file.read_text(encoding="utf-8").splitlines()
    keys = tuple(key.strip() for key in given if key.strip())
    if file is not None and not keys:
        raise ValueError(f"needed a key a line; {file} has none")
    return keys


def _log_requests() -> None:
    """Write a line of JSON a request to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    requests = logging.getLogger("jaxcp.serve.requests")
    requests.addHandler(handler)
    requests.setLevel(logging.INFO)
    requests.propagate = False
    logging.getLogger("jaxcp.serve").setLevel(logging.INFO)
