# SPDX-License-Identifier: Apache-2.0
"""Remembers which token sequences lie in which pages, so that a common prefix is computed once.

A radix tree over token ids: a node has a run of tokens, and a path from the root spells a sequence
that has been computed. A place (page number of a row) belongs to the one node of a path in whose
run the place's tokens end: a node that ends inside a page leaves that page to its children, each of
which has its own with the common tokens in front, and keeps it only while it has no child. So every
page of the tree belongs to one node, and splitting a node divides its pages.

    page_size 4      "abcdef" ── "gh"      pages: [p0]  [p1: e f g h]
                              └─ "xyz"                  [p2: e f x y] [p3: z]

A row locks the path of the whole pages that it shares; what is not locked may be evicted, least
recently used first and from the end of a leaf. A node can have a snapshot: a state after exactly
the tokens up to its end. Where there is a store on the host, what is evicted goes there, and is
found behind what the tree has itself.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxcp.inference.host_store import Block, HostStore, common, digests
from jaxcp.inference.limits import ChunkLimits
from jaxcp.inference.pages import Pages


class Match(NamedTuple):
    """The part of a sequence that need not be computed."""

    length: int
    """Tokens."""
    pages: list[int]
    """Pages that are full of them: they can be shared."""
    source: int | None
    """The page to copy from, where they end inside a page."""
    state: int | None
    """The snapshot to copy from, where a row has a state."""
    known: int
    """Tokens that are here: more than `length` where no snapshot was taken after them."""
    resident: int
    """Tokens that a row could start from without the host."""
    blocks: Sequence[Block] = ()
    """Contents of the pages behind `pages`, on the host."""
    state_block: Block | None = None
    """Snapshot on the host, in place of `state`."""


class Node:
    __slots__ = ("children", "locks", "pages", "parent", "start", "state", "tokens")

    def __init__(self, start: int, tokens: array, pages: list[int], parent: "Node | None"):
        self.start, self.tokens, self.pages, self.parent = start, tokens, pages, parent
        self.children: dict[int, Node] = {}
        self.locks = 0
        self.state: int | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def path(self) -> Iterator["Node"]:
        """This node, its parent, and so on; not the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class PrefixTree:
    """The tree over the pages of one pool.

    Nodes that are not locked are kept in the order of their latest use. Whoever uses a node uses
    its path, so a node comes before its parent, and the first of all is a leaf. Snapshots have an
    order of their own: those that a growing conversation has left behind go before its latest.
    """

    def __init__(self, pages: Pages, host: HostStore | None = None):
        self.pool, self.host, self._size = pages, host, pages.page_size
        self.root = Node(0, array("i"), [], None)
        self._unlocked: OrderedDict[Node, None] = OrderedDict()
        self._snapshots: OrderedDict[Node, None] = OrderedDict()
        self._spelled = self.root, array("i"), digests(array("i"), self._size)  # see `_spell`

    def match(self, ids: Sequence[int], limit: int, *, host: bool = True) -> Match:
        """The longest prefix, of at most `limit` tokens, that a row can start from.

        Where rows have states it ends at a snapshot. A row that wants logits computes at least its
        last token: its limit is `len(ids) - 1`.

        Args:
          host: whether to look for more on the host.
        """
        ids = array("i", ids[:limit])
        match = self._resident(ids)
        return match if self.host is None or not host else self._extended(ids, match, self.host)

    def cheapest(self, ids: Sequence[int], chunks: ChunkLimits) -> tuple[Match, float]:
        """Choose what a row with this prompt starts from; with the seconds of fetching it.

        It computes what would take longer to fetch from the host.
        """
        count = len(ids)
        match = self.match(ids, count - 1)
        if match.length == match.resident or self.host is None:
            return match, 0.0
        pages = self.pool.on_shard(len(match.blocks), 0)
        fetch = self.host.limits.seconds(pages, match.state_block is not None)
        compute = chunks.total(count - match.resident, match.resident)
        compute -= chunks.total(count - match.length, match.length)
        if self.host.pays(match.length - match.resident, fetch, compute):
            return match, fetch
        return self.match(ids, count - 1, host=False), 0.0

    def _resident(self, ids) -> Match:
        """The longest prefix whose pages, and snapshot, are in the pool."""
        node, length, pages = self._walk(ids)
        known = length
        if self.pool.states.size:
            if length < node.end:
                node = node.parent or node
            while node.parent is not None and node.state is None:
                node = node.parent
            length = node.end
        self._use(node)
        if node.state is not None:
            self._snapshots.move_to_end(node)
        full, rest = divmod(length, self._size)
        source = self._page(node, full) if rest else None
        return Match(length, pages[:full], source, node.state, known, length)

    def _extended(self, ids, match, host: HostStore) -> Match:
        """The longest prefix that is here or on the host."""
        reach, blocks = host.reach(ids, match.known)
        length, state = reach, None
        if self.pool.states.size:
            length, state = host.snapshot(ids, match.length, reach)
        node, common, pages = self._walk(ids[:length])
        if length == match.length:
            return match._replace(known=reach)
        self._use(node)
        full, source = common // self._size, None
        blocks = blocks[: self.pool.places(length) - full] if length > common else []
        if length == common and length % self._size:
            source = self._page(node, full)
        host.use([*blocks, *filter(None, [state])])
        return match._replace(
            length=length, pages=pages[:full], source=source, state=None, known=reach,
            blocks=blocks, state_block=state,
        )  # fmt: skip

    def known(self, ids: Sequence[int]) -> int:
        """Count the first tokens of a sequence that are here or on the host."""
        ids = array("i", ids)
        length = self._walk(ids)[1]
        return length if self.host is None else self.host.reach(ids, length)[0]

    def table(self, ids: Sequence[int]) -> tuple[list[int], int]:
        """The pages that have the first tokens of a sequence, and how many tokens are here.

        To look at: that counts as no use, and where layers have states less may be reused.
        """
        node, length, pages = self._walk(array("i", ids))
        full, rest = divmod(length, self._size)
        return pages[:full] + ([self._page(node, full)] if rest else []), length

    def insert(self, ids: Sequence[int], table: Sequence[int], state: int | None = None) -> None:
        """Keep the pages of a row that has computed `ids`, as far as they are new.

        Tokens that are here already keep the pages they have: whoever holds copies matches again
        and takes these. `state` is a snapshot after `ids`, kept unless there is one.
        """
        ids = array("i", ids)
        node, length, _ = self._walk(ids)
        if length < node.end and (length < len(ids) or state is not None):
            node = self._split(node, length)
        if length < len(ids):
            node = self._append(node, ids[length:], table)
        if state is not None and node.state is None and node is not self.root:
            self.pool.states.keep(state)
            node.state = state
            self._snapshots[node] = None
        self._use(node)

    def lock(self, ids: Sequence[int], length: int) -> Node:
        """Protect the first `length` tokens, whole pages that are here; give the end to `unlock`.

        The caller holds all of these pages, and no others of the path: so a lock never keeps a page
        from anybody.
        """
        node, found, _ = self._walk(array("i", ids[:length]))
        if found != length or length % self._size:
            raise ValueError(f"can lock whole pages of {found} tokens, not length={length}")
        if length < node.end:
            node = self._split(node, length)
        for above in node.path():
            above.locks += 1
            self._unlocked.pop(above, None)
        return node

    def unlock(self, node: Node) -> None:
        for above in node.path():
            above.locks -= 1
            if not above.locks:
                self._unlocked[above] = None
        self._use(node)

    def take_page(self, place: int) -> int | None:
        """A page for this place of a row, evicted where none is free; None where that cannot be."""
        page = self.pool.take(place)
        if page is None and self.evict(place % self.pool.shards):
            page = self.pool.take(place)
        return page

    def take_state(self) -> int | None:
        """A state, evicted where none is free; None where that cannot be."""
        state = self.pool.states.take()
        if state is None and self.evict_state():
            state = self.pool.states.take()
        return state

    def evict(self, shard: int) -> bool:
        """Make a page of this shard free; False where that cannot be."""
        pool = self.pool.pools[shard]
        while not pool.free and pool.evictable:
            self._shorten(next(iter(self._unlocked)))
        return pool.free > 0

    def evict_state(self) -> bool:
        """Make a state free; False where no snapshot is left. Locks protect pages alone."""
        while not self.pool.states.free and self._snapshots:
            self._forget_state(next(iter(self._snapshots)))
        return self.pool.states.free > 0

    def clear(self, *, lost: bool = False) -> None:
        """Forget all that is not locked.

        Args:
          lost: whether the pages have lost what was in them: it does not go to the host then.
        """
        if lost:
            self.lose(block for leaving in self.take_leaving() for _, block in leaving)
        while self._unlocked:
            self._shorten(next(iter(self._unlocked)), save=not lost)

    def take_leaving(self) -> tuple[list[tuple[int, Block]], list[tuple[int, Block]]]:
        """The pages, and the states, that the next plan copies to the host."""
        return ([], []) if self.host is None else self.host.take_leaving()

    def lose(self, blocks: Iterable[Block]) -> None:
        """Forget blocks of the host whose copies may never have been made."""
        if self.host is not None:
            self.host.lose(blocks)

    def pages(self) -> list[int]:
        return [page for node in self._nodes() for page in node.pages]

    def snapshots(self) -> list[int]:
        return [node.state for node in self._snapshots if node.state is not None]

    def check(self) -> None:
        """Raise AssertionError where the tree contradicts itself."""
        nodes = list(self._nodes())
        age = {node: number for number, node in enumerate(self._unlocked)}
        assert age.keys() == {node for node in nodes if not node.locks}
        assert self._snapshots.keys() == {node for node in nodes if node.state is not None}
        for node in nodes:
            parent = node.parent
            assert node.tokens and parent is not None and node.start == parent.end
            assert parent.children[node.tokens[0]] is node
            ends = node.end // self._size if node.children else self.pool.places(node.end)
            assert len(node.pages) == ends - node.start // self._size
            assert node.locks >= sum(child.locks for child in node.children.values())
            assert not (node in age and parent in age) or age[node] < age[parent]
        if self.host is not None:
            self.host.check()

    def _walk(self, ids):
        """The last node of the common path, how many tokens are common, the pages of the path."""
        node, length, pages = self.root, 0, []
        while length < len(ids) and (child := node.children.get(ids[length])):
            node = child
            pages += child.pages
            length += common(child.tokens, ids[length : length + len(child.tokens)])
            if length < child.end:
                break
        return node, length, pages

    def _page(self, node, place):
        """The page for the place in which `node` ends: its own, or any child's."""
        while place >= node.start // self._size + len(node.pages):
            node = next(iter(node.children.values()))
        return node.pages[place - node.start // self._size]

    def _split(self, node, at):
        """Put the tokens before position `at` into a new parent of `node`, and return that."""
        count, place = at - node.start, at // self._size - node.start // self._size
        upper = Node(node.start, node.tokens[:count], node.pages[:place], node.parent)
        upper.locks, upper.children = node.locks, {node.tokens[count]: node}
        node.parent.children[node.tokens[0]] = node.parent = upper
        node.start, node.tokens, node.pages = at, node.tokens[count:], node.pages[place:]
        if not upper.locks:
            self._unlocked[upper] = None
            self._use(upper)
        return upper

    def _append(self, node, tokens, table):
        """Add a leaf under `node`; the page in which a leaf so far ended passes to it."""
        start = node.end
        pages = list(table[start // self._size : self.pool.places(start + len(tokens))])
        given = None
        if not node.children and start % self._size:
            given = node.pages.pop()
        for page in pages:
            if page != given:
                self.pool.keep(page)
        if given is not None and given != pages[0]:
            self.pool.drop(given)
        leaf = node.children[tokens[0]] = Node(start, tokens, pages, node)
        self._unlocked[leaf] = None
        return leaf

    def _shorten(self, leaf, *, save=True):
        """Forget the last page of a leaf, with its tokens."""
        if leaf.state is not None:
            self._forget_state(leaf, save=save)
        if save and self.host is not None:
            self.host.save_page(leaf.pages[-1], *self._spell(leaf))
        page, parent = leaf.pages.pop(), leaf.parent
        first = leaf.tokens[0]
        del leaf.tokens[max(0, (leaf.end - 1) // self._size * self._size - leaf.start) :]
        if leaf.tokens:
            self.pool.drop(page)
            return
        del parent.children[first], self._unlocked[leaf]
        if leaf.start % self._size and not parent.children:
            parent.pages.append(page)  # which the parent's last tokens are in
        else:
            self.pool.drop(page)

    def _forget_state(self, node, *, save=True):
        if save and self.host is not None:
            self.host.save_state(node.state, *self._spell(node))
        self.pool.states.drop(node.state)
        node.state = None
        del self._snapshots[node]

    def _spell(self, node) -> tuple[bytes, bytes]:
        """The digest of the tokens before the page in which a node ends, and its tokens in there.

        What was spelled last is remembered: eviction goes from the end of a leaf to its parent.
        """
        latest, ids, starts = self._spelled
        if node is not latest and node is not latest.parent:
            ids = array("i")
            for above in reversed([*node.path()]):
                ids += above.tokens
            starts = digests(ids, self._size)
        self._spelled = node, ids, starts
        place = (node.end - 1) // self._size
        return starts[place], ids[place * self._size : node.end].tobytes()

    def _use(self, node):
        for above in node.path():
            if above in self._unlocked:
                self._unlocked.move_to_end(above)

    def _nodes(self):
        pending = [*self.root.children.values()]
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())
