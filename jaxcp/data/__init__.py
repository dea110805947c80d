# SPDX-License-Identifier: Apache-2.0
"""Batches on the host: sources, packing, shifting and drafts. NumPy alone."""
