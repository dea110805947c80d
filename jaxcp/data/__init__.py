# SPDX-License-Identifier: Apache-2.0
"""Batches on the host: prepared files, sources, shifting and drafts. NumPy alone."""
