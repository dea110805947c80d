# SPDX-License-Identifier: Apache-2.0
"""Perplexity is that of transformers' own loss, window by window, as its guide computes it.

Needs the extra `hf`: transformers and a torch that runs on the CPU.
"""

import numpy as np
import pytest
from tiny_checkpoints import FIXTURES, random_model

import jaxcp
from jaxcp.evaluate.perplexity import evaluate_perplexity
from jaxcp.evaluate.texts import Text

transformers = pytest.importorskip("transformers", reason="needs pip install jaxcp[hf]")
torch = pytest.importorskip("torch", reason="needs pip install jaxcp[hf]")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend


@pytest.mark.parametrize("name", ["gpt2-tiny", "qwen3-moe-tiny"])
def test_equals_the_loss_of_transformers(name, tmp_path, mesh_of):
    config = jaxcp.load_config(FIXTURES / name)
    jaxcp.save(random_model(config), tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    ).eval()
    ids = np.random.default_rng(1).integers(0, config.vocab_size, 50).astype(np.int32)
    context, stride, total, before = 24, 10, 0.0, 1
    for start in range(0, len(ids), stride):
        stop = min(start + context + 1, len(ids))
        labels = ids[start:stop].astype(np.int64)
        inputs = torch.from_numpy(labels.copy())[None]
        labels[: before - start] = -100
        with torch.no_grad():
            loss = theirs(inputs, labels=torch.from_numpy(labels)[None]).loss.item()
        total, before = total + loss * (stop - before), stop
        if stop == len(ids):
            break
    mesh_of(seq=2)
    model, _ = jaxcp.load(tmp_path / "out")
    found = evaluate_perplexity(model, [Text(ids, 1, 0)], context=context, stride=stride)
    assert found.tokens == 49 and found.bits_per_byte is None
    assert found.loss == pytest.approx(total / 49, rel=1e-5)
