# SPDX-License-Identifier: Apache-2.0
"""Reads what a model writes: its thinking, its answer, and the calls of tools among them."""
