# SPDX-License-Identifier: Apache-2.0
"""Attention over keys that go round a ring of devices, communication and all in one kernel."""

from pallas_kernels.ring_attention.api import ring_attention

__all__ = ["ring_attention"]
