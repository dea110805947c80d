# SPDX-License-Identifier: Apache-2.0
"""What a layer sees and keeps: one file a kind of attention. Knows no flax."""
