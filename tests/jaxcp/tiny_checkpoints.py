# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in tests/fixtures, and broken ones made of them."""

import json
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

FIXTURES = Path(__file__).parents[1] / "fixtures"


def flat(model):
    state = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, keys)): leaf.get_value() for keys, leaf in state}


def same(a, b):
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    return all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


def tensors(name):
    return load_file(FIXTURES / name / "model.safetensors")


def write(folder, name, contents, **config):
    """A checkpoint with the fixture's config.json, fields changed, and these tensors."""
    folder.mkdir(exist_ok=True)
    fields = json.loads((FIXTURES / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | config))
    save_file(
        {k: np.ascontiguousarray(v) for k, v in contents.items()}, folder / "model.safetensors"
    )
    return folder
