# SPDX-License-Identifier: Apache-2.0
"""One server over a tiny model for all of these tests."""

import openai
import pytest
from running_server import running
from tiny_chat import tiny_engine, tokenizer_of


@pytest.fixture(scope="package")
def engine(tmp_path_factory):
    return tiny_engine(tokenizer_of(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="package")
def server(engine):
    with running(engine) as server:
        yield server


@pytest.fixture(scope="module")  # a module may have a server of its own
def client(server):
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
