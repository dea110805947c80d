# SPDX-License-Identifier: Apache-2.0
"""Context parallelism beside the other implementations that can be compared without a device.

    make bench-cp

deviceless: predicted times on TPU slices, from compiled programs, beside tokamax's ring.
cpu: wall clock and errors on four emulated CPU devices, beside the package `ringattention`.

By itself: `benchmarks.cp.memory`, bytes a device for 32K to 1M tokens.
"""
