# SPDX-License-Identifier: Apache-2.0
"""Context parallelism beside the other implementations that can be compared without a device.

    make bench-cp

deviceless: predicted times on TPU slices, from compiled programs, beside tokamax's ring.
cpu: wall clock, errors and bits on four emulated CPU devices, beside five packages.
emulation: what eight emulated devices cost against one.

By themselves: `benchmarks.cp.memory` (bytes a device, 32K to 1M tokens) and
`benchmarks.cp.reproducible` (what the same bits cost).
"""
