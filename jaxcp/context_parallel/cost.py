# SPDX-License-Identifier: Apache-2.0
"""Bytes that attention sends and holds, by arithmetic: `Strategy.cost(shapes)`.

Tests hold every strategy's cost against compiled programs, so it is what they do.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """One device's share of q, k and v, and the mask as far as traffic depends on it.

    `tokens` and `keys` are a shard's; keys default to the tokens, value_dim to head_dim.
    `itemsize`: bytes of a number of q, k, v and out. `segments`: whether there are segment ids.
    """

    shards: int
    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int = 0
    keys: int = 0
    batch: int = 1
    itemsize: int = 2
    window: int | None = None
    causal: bool = True
    segments: bool = False

    def __post_init__(self):
        for name, default in (("value_dim", self.head_dim), ("keys", self.tokens)):
            object.__setattr__(self, name, getattr(self, name) or default)
        for name in ("shards", "tokens", "num_heads", "num_kv_heads", "head_dim", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {name}={getattr(self, name)}")

    @property
    def acc(self) -> int:
        """Bytes of a number of partial results, lse and travelling gradients."""
        return max(4, self.itemsize)

    @property
    def rows(self) -> int:
        """Rows of q and out of all heads."""
        return self.batch * self.tokens * self.num_heads

    @property
    def q_bytes(self) -> int:
        return self.rows * self.head_dim * self.itemsize

    @property
    def out_bytes(self) -> int:
        return self.rows * self.value_dim * self.itemsize

    @property
    def partial_bytes(self) -> int:
        """Bytes of a result that is still to be merged."""
        return self.rows * self.value_dim * self.acc

    @property
    def kv_numbers(self) -> int:
        return self.batch * self.keys * self.num_kv_heads * (self.head_dim + self.value_dim)

    @property
    def kv_bytes(self) -> int:
        return self.kv_numbers * self.itemsize

    @property
    def ids(self) -> int:
        """Arrays of int32 that say what may be seen: positions, and segment ids."""
        return 2 if self.segments else 1

    @property
    def key_ids_bytes(self) -> int:
        return 4 * self.ids * self.batch * self.keys

    @property
    def query_ids_bytes(self) -> int:
        return 4 * self.ids * self.batch * self.tokens


@dataclasses.dataclass(frozen=True)
class Traffic:
    """`count` collectives of a kind among `among` devices.

    `bytes` is their sum as `jaxcp.compile.Collective` counts a device's: what a permute sends, else
    the whole array that is gathered, scattered or exchanged.
    """

    kind: str
    count: int
    bytes: int
    among: int

    @property
    def sent(self) -> int:
        """Bytes that leave a device: all but its own share of a whole array."""
        if self.kind in ("collective-permute", "remote-dma"):
            return self.bytes
        ways = 2 if self.kind == "all-reduce" else 1  # there and back
        return ways * self.bytes * (self.among - 1) // self.among


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Traffic of a device in each pass, and bytes that it holds in the forward one.

    `backward` is what a gradient adds, in one program with `forward`. `held`: bytes beside the
    arguments of a forward pass, the result included.
    """

    forward: tuple[Traffic, ...]
    backward: tuple[Traffic, ...]
    held: int

    def __post_init__(self):
        for name in ("forward", "backward"):  # among one device nothing travels
            real = tuple(x for x in getattr(self, name) if x.among > 1 and x.count)
            object.__setattr__(self, name, real)

    @property
    def sent(self) -> int:
        """Bytes that leave a device in a forward pass."""
        return sum(x.sent for x in self.forward)

    @property
    def sent_backward(self) -> int:
        return sum(x.sent for x in self.backward)


def circle_cost(shapes: Shapes, *, directions: int = 1, kind: str = "collective-permute") -> Cost:
    """The cost of `circulate`: keys that go round `shapes.shards` devices, in equal parts a way."""
    n, turns = shapes.shards, shapes.shards - 1
    keys = Traffic(
        kind,
        directions * turns * (2 + shapes.ids),
        turns * (shapes.kv_bytes + shapes.key_ids_bytes),
        n,
    )
    gradients = Traffic(kind, directions * turns * 2, turns * shapes.kv_numbers * shapes.acc, n)
    travelling = min(turns, 2) * (shapes.kv_bytes + shapes.partial_bytes)
    return Cost(forward=(keys,), backward=(keys, gradients), held=shapes.out_bytes + travelling)
