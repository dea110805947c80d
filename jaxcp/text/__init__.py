# SPDX-License-Identifier: Apache-2.0
"""Strings and token ids: tokenizers, conversations, and what models answer. Knows no jax."""
