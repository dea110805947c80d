# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for chips that are not there, read down to the machine code, against the bars.

    make bench-deviceless

What is counted: the instruction mix, registers and spills of an NVIDIA kernel and the bundles of a
TPU kernel (`jaxcp/compile/{gpu,tpu}_code.py`, `jaxcp/tune/tpu_cost.py`). A bundle issues in a cycle
of a TensorCore, so bundles of a tile are its run time where DMA is hidden and no unit stalls. They
are no measurement: nothing here has run.
"""
