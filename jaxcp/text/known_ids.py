# SPDX-License-Identifier: Apache-2.0
"""Writes a conversation in the ids in which it was computed.

A model need not cut its words as the tokenizer would: what it wrote has other ids when a template
writes it again. What is computed is found by its ids: those are taken where the text is the same.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence

from jaxcp.text.tokenizer import Tokenizer


def in_known_ids(
    tokenizer: Tokenizer, ids: Sequence[int], known: Sequence[int], ends: Collection[int]
) -> list[int]:
    """Return `ids` with those of `known` in front, as far as both begin with the same turns.

    Args:
      ends: ids that end a turn. A turn is the same if it has the same text, and the same added
        tokens: those that are written out in a text are none.
    """
    added = tokenizer.backend.get_added_tokens_decoder().keys()

    def spelled(turn: Sequence[int]) -> tuple[str, list[int]]:
        text = tokenizer.backend.decode(turn, skip_special_tokens=False)
        return text, [i for i in turn if i in added]

    same: list[int] = []
    done = 0
    for new, old in zip(_turns(ids, ends), _turns(known, ends), strict=False):
        if new != old and spelled(new) != spelled(old):
            break
        same, done = same + old, done + len(new)
    return [*same, *ids[done:]]


def _turns(ids: Sequence[int], ends: Collection[int]) -> Iterator[list[int]]:
    """Cut behind each of `ends`; the last part may have none."""
    begin = 0
    for end in itertools.chain((i + 1 for i, x in enumerate(ids) if x in ends), [len(ids)]):
        if end > begin:
            yield list(ids[begin:end])
        begin = end
