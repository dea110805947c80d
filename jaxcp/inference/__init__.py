# SPDX-License-Identifier: Apache-2.0
"""Long prompts in, answers out."""

import jaxcp.flax_version  # noqa: F401  (before flax)

# isort: split
from jaxcp.inference.chat_session import ChatSession
from jaxcp.inference.engine import Engine
from jaxcp.inference.result import Result
from jaxcp.inference.sampling import Sampling
from jaxcp.inference.session import Session, Stats
from jaxcp.inference.steps import decode_step, logits, prefill

__all__ = [
    "ChatSession",
    "Engine",
    "Result",
    "Sampling",
    "Session",
    "Stats",
    "decode_step",
    "logits",
    "prefill",
]
