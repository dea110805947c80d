# SPDX-License-Identifier: Apache-2.0
"""The kinds of attention: what a layer sees and keeps, one file a kind. Knows no flax."""
