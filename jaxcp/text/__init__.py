# SPDX-License-Identifier: Apache-2.0
"""Strings and token ids: tokenizer and streaming decoding. Knows nothing of jax."""
