# SPDX-License-Identifier: Apache-2.0
"""An index selects the earlier one of keys that it scores alike, on any mesh and in any pieces.

With two index heads many scores are exactly 0, ReLU's, and more keys tie than are selected. Which
of them `torch.topk` takes is not defined, in transformers as in DeepSeek's code: theirs is given
the earlier one here, and for comparison the later one.
"""

import collections
import functools

import numpy as np
import pytest
from tiny_checkpoints import tensors, write

import jaxcp
from jaxcp import Contiguous

transformers = pytest.importorskip("transformers", reason="needs pip install jaxcp[hf]")
torch = pytest.importorskip("torch", reason="needs pip install jaxcp[hf]")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend

V32, V4 = "deepseek-v32-tiny", "deepseek-v4-tiny"
HEADS, LENGTH = 2, 57
TOP = {V32: 16, V4: 4}
"""Keys that are selected of 57, and blocks of 14, of 4 tokens."""
CLOSE = {"atol": 1e-4, "rtol": 0}
Best = collections.namedtuple("Best", "values indices")


def earlier(x, k, dim=-1, **options):
    """`torch.topk` where of equals the earlier one is taken."""
    del options
    values, indices = torch.sort(x, dim=dim, descending=True, stable=True)
    return Best(values.narrow(dim, 0, k), indices.narrow(dim, 0, k))


def later(x, k, dim=-1, **options):
    best = earlier(x.flip(dim), k, dim, **options)
    return Best(best.values, x.shape[dim] - 1 - best.indices)


def folder_of(name, folder):
    """The fixture with the first of its index heads alone."""
    contents = tensors(name)
    changed = 0
    for key, x in contents.items():
        if "indexer" in key and x.shape[0] in (8, 8 * 16) and x.ndim == 2:  # weights, queries
            contents[key] = x[: x.shape[0] * HEADS // 8]
            changed += 1
    assert changed >= 2
    return write(folder, name, contents, index_n_heads=HEADS, index_topk=TOP[name])


@functools.cache
def tokens():
    return np.random.default_rng(0).integers(3, 256, (2, LENGTH))


def theirs(folder, monkeypatch, topk):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "topk", topk)
        patch.setattr(torch.Tensor, "topk", topk)
        return model.eval()(torch.from_numpy(tokens()), use_cache=False).logits.numpy()


@pytest.fixture(params=[V32, V4])
def case(request, tmp_path, monkeypatch):
    """`(folder, logits with the earlier of equals)`."""
    folder = folder_of(request.param, tmp_path / "in")
    return folder, theirs(folder, monkeypatch, earlier)


def test_of_equal_scores_the_earlier_key_is_selected(case, monkeypatch):
    folder, expected = case
    model, _ = jaxcp.load(folder)
    np.testing.assert_allclose(jaxcp.logits(model, tokens()), expected, **CLOSE)
    far = np.abs(theirs(folder, monkeypatch, later) - expected).max()
    assert far > 0.1, "the selection ties, and the rule is seen"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "strategy"),
    [({"seq": 2}, None), ({"seq": 3}, None), ({"seq": 3}, jaxcp.Ring(layout=Contiguous()))],
)
def test_it_is_over_a_mesh(case, axes, strategy, mesh_of):
    """57 tokens divide by neither: there are pads."""
    folder, expected = case
    mesh_of(**axes)
    model, _ = jaxcp.load(folder)
    found = jaxcp.logits(model, tokens(), strategy=strategy)
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{}, {"seq": 2}, {"seq": 3}])
def test_it_is_in_pieces_and_in_decoding(case, axes, mesh_of):
    """Turns of several sizes, rows of different lengths, then one token after the other."""
    folder, expected = case
    if axes:
        mesh_of(**axes)
    model, _ = jaxcp.load(folder)
    cache, end = model.init_cache(batch_size=2, max_len=64), np.zeros(2, int)
    for turn in ([20, 13], [9, 16], [21, 11]):
        pieces = [tokens()[i, e : e + n] for i, (e, n) in enumerate(zip(end, turn, strict=True))]
        padded = np.zeros((2, max(turn)), np.int32)
        for row, piece in zip(padded, pieces, strict=True):
            row[: len(piece)] = piece
        found, cache = jaxcp.prefill(model, cache, padded, lengths=np.array(turn))
        end = end + turn
        np.testing.assert_allclose(found, expected[[0, 1], end - 1], **CLOSE)
    for _ in range(7):
        found, cache = jaxcp.decode_step(model, cache, tokens()[[0, 1], end])
        np.testing.assert_allclose(found, expected[[0, 1], end], **CLOSE)
        end = end + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "axes"), [(V32, {}), (V32, {"seq": 3}), (V4, {})], indirect=["case"]
)
def test_it_is_in_the_engine(case, axes, mesh_of):
    """Two rows in pages, the second turn behind the first: each answer is the likeliest."""
    folder, _ = case
    if axes:
        mesh_of(**axes)
    model, _ = jaxcp.load(folder)
    engine = jaxcp.Engine(model, None, max_len=96, stop_tokens=())
    texts = [tokens()[0, :41].tolist(), tokens()[1, :33].tolist()]
    for _ in range(2):
        results = engine.generate(texts, jaxcp.Sampling(max_new_tokens=6))
        texts = [text + result.tokens for text, result in zip(texts, results, strict=True)]
    assert all(result.stats.reused for result in results)
    for text in texts:
        likeliest = np.asarray(jaxcp.logits(model, np.array([text]))).argmax(-1)[0]
        assert likeliest[-13:-1].tolist() == text[-12:]
