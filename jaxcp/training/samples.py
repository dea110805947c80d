# SPDX-License-Identifier: Apache-2.0
"""Texts that a model writes while it is trained, by the engine, on the mesh of the run."""

from typing import Any

from jaxcp.inference import Engine, Sampling
from jaxcp.text.tokenizer import Tokenizer
from jaxcp.training.config import SampleConfig


def room_for(model_config: Any, tokenizer: Tokenizer, config: SampleConfig) -> tuple[int, int]:
    """Count the tokens of prompt and answer, and those of the answer, as many as there is room for.

    Raises:
      ValueError: the tokenizer cannot encode the prompt, or the model has too few positions.
    """
    prompt = len(tokenizer.encode(config.prompt))
    most = getattr(model_config, "max_positions", prompt + config.tokens)
    if prompt > most:
        raise ValueError(f"samples.prompt has {prompt} tokens; the model has {most} positions")
    total = min(most, prompt + config.tokens)
    return total, min(config.tokens, total - prompt + 1)


def sample(model: Any, tokenizer: Tokenizer, config: SampleConfig, seed: int = 0) -> str:
    """Continue the prompt; the same seed and weights write the same text."""
    total, new = room_for(model.config, tokenizer, config)
    engine = Engine(model, tokenizer, max_len=total, max_rows=1, pool_tokens=total)
    sampling = Sampling(max_new_tokens=new, temperature=config.temperature, seed=seed)
    [result] = engine.generate([config.prompt], sampling)
    return result.text or ""
