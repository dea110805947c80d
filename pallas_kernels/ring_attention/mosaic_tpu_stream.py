# SPDX-License-Identifier: Apache-2.0
"""Chunks of keys, values or their gradients on their way from device to device, and their slots."""

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SLOTS = 2


class Stream:
    """Arrays `[slots, B, S, width]` whose chunks travel from slot to slot, a ring for each chunk.

    A credit says that the neighbour ahead has read the slot that is written next and sent it on.
    """

    def __init__(self, ring, ring_ref, arrays, sent, arrived, credit):
        self.ring, self.ring_ref, self.arrays = ring, ring_ref, arrays
        self._sent, self._arrived, self._credit = sent, arrived, credit

    def part(self, ref, chunk):
        return ref.at[:, pl.ds(chunk * self.ring.chunk, self.ring.chunk), :]

    def fill(self, slot, chunk, sources):
        """Begin to copy `[B, S, width]` of this device; `wait` for it as for what arrives."""
        for i, (source, ref) in enumerate(zip(sources, self.arrays, strict=True)):
            parts = self.part(source, chunk), self.part(ref.at[slot], chunk)
            pltpu.make_async_copy(*parts, self._arrived.at[i, slot, chunk]).start()

    def wait(self, slot, chunk):
        for i, ref in enumerate(self.arrays):
            part = self.part(ref.at[slot], chunk)
            pltpu.make_async_copy(part, part, self._arrived.at[i, slot, chunk]).wait()

    def _copies(self, source, chunk):
        target = 1 - source
        device = self.ring.neighbour(self.ring_ref, chunk, ahead=True)
        for i, ref in enumerate(self.arrays):
            yield pltpu.make_async_remote_copy(
                self.part(ref.at[source], chunk),
                self.part(ref.at[target], chunk),
                self._sent.at[i, chunk],
                self._arrived.at[i, target, chunk],
                device_id=device,
            )

    def send(self, source, chunk):
        for copy in self._copies(source, chunk):
            copy.start()

    def sent(self, source, chunk):
        for copy in self._copies(source, chunk):
            copy.wait_send()

    def grant(self, chunk):
        device = self.ring.neighbour(self.ring_ref, chunk, ahead=False)
        pl.semaphore_signal(self._credit.at[chunk], 1, device_id=device)

    def take(self, chunk):
        pl.semaphore_wait(self._credit.at[chunk], 1)


def arrive(ring, keys, step, chunk):
    """Wait for the chunk of this step and pass it on."""
    slot = lax.rem(step, SLOTS)
    keys.wait(slot, chunk)

    @pl.when(step < ring.size - 1)
    def _():
        pl.when(step > 0)(lambda: keys.take(chunk))
        keys.send(slot, chunk)


def leave(ring, keys, step, chunk):
    """Give the slot free, once it is read and sent on."""
    pl.when(step < ring.size - 1)(lambda: keys.sent(lax.rem(step, SLOTS), chunk))
    pl.when(step < ring.size - 2)(lambda: keys.grant(chunk))
