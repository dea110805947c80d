# SPDX-License-Identifier: Apache-2.0
"""One suite an operation: its cases, and `check` of any implementation against float64 NumPy."""
