# SPDX-License-Identifier: Apache-2.0
"""How logits are changed before a token is chosen, a token at a time and in float64."""

import numpy as np


def changed(logits, prompt, answer, sampling):
    """Biases, the penalty of repetition (CTRL's rule), those of presence and frequency."""
    logits = np.asarray(logits, np.float64).copy()
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    for token in {*prompt, *answer}:
        factor = sampling.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(answer):
        times = list(answer).count(token)
        logits[token] -= sampling.frequency_penalty * times + sampling.presence_penalty
    return logits
