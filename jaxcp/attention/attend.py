# SPDX-License-Identifier: Apache-2.0
"""The attention that a model hands to its layers: over a whole sequence, or over a cache.

A model is given one `Attend`; `attend.of(state, layer)` makes that of each layer, which calls the
one method that fits what it has computed:

| method | of | who |
|---|---|---|
| `__call__(q, k, v, window=)` | heads with keys and values of their own | `Attention` |
| `latent(q, latent, weights)` | a latent that keys and values are made of | `LatentAttention` |
| `selected(q, keys, selection)` | one head of keys, of which an index selects | the same |
| `compress`, `compressed`, `shared` | a window, and entries of blocks | `CompressedAttention` |
| `convolved(inputs, taps)`, `delta(q, k, v, ...)` | a recurrence, in order | `GatedDelta` |

What a layer keeps (its keys and values) goes through as a value, `state`, so that layers alike can
be scanned: `kept(name)` gives what a stack of layers keeps, with a leading axis of layers, and
`keep(name, state)` takes it back.
"""

from typing import Any


class Attend:
    """Attention that keeps nothing: a subclass that does overrides all of this."""

    keeps_rows = False
    """True where calls change what is kept; there is no backward pass then."""

    state: Any = None
    """The state that the layer keeps after its calls."""

    def kept(self, name: str) -> Any:
        """Give what the stack `name` keeps, arrays with a leading axis of layers."""
        return None

    def keep(self, name: str, state: Any) -> None:
        """Take back what `kept` gave, after the layers have run."""

    def of(self, state: Any, layer: Any) -> "Attend":
        """Attention of one layer, the row `layer` (an int32 scalar) of the stack's `state`."""
        return self
