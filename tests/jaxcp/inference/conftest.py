# SPDX-License-Identifier: Apache-2.0
"""An engine over a tiny model with Hy3's template, for the tests of conversations."""

import pytest
from tiny_chat import tiny_chat_model, tokenizer_of

import jaxcp


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def model():
    return tiny_chat_model(2048)


@pytest.fixture(scope="module")
def one_engine(model, folder):
    return jaxcp.Engine(model, tokenizer_of(folder, "hy3"), max_len=2048)


@pytest.fixture
def engine(one_engine):
    one_engine.scheduler.tree.clear()
    return one_engine
