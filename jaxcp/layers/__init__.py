# SPDX-License-Identifier: Apache-2.0
"""Layers of models: parameters with named axes, and what is computed with them."""

import jaxcp.flax_version  # noqa: F401  (before flax)
