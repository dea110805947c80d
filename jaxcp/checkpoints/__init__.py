# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that come with the package."""

import pathlib

NEEDLE = pathlib.Path(__file__).parent / "needle"
"""926,360 parameters, byte-level; finds needles at 128K. Made by `jaxcp/configs/needle.py`."""
