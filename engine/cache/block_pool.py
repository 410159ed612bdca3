"""Where keys and values live: a fixed pool of blocks with reference counts and a prefix cache. No torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, count

# What identifies a full block: the identity of the block before it (the salt, for the first one) and its tokens.
_Key = tuple[Hashable, tuple[int, ...]]


class BlockPool:
    """A fixed number of blocks of ``block_size`` tokens, each in one of three places.

    - used: held by at least one sequence (reference count > 0);
    - cached: held by no sequence, but its content is still indexed; reused for new content, least recently used first;
    - free: without indexed content.

    Every indexed content has an identity that is never used twice, and a block is looked up by its parent's identity
    together with its own tokens. The dictionary compares both in full, so a hash collision cannot share a wrong block,
    and a chain of equal keys means an equal prefix under an equal salt. ``on_forgotten`` is called with an identity
    whose content is indexed no longer.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._index: dict[_Key, int] = {}
        self._keys: list[_Key | None] = [None] * num_blocks
        # The identity of a block's content, which may be indexed as another block that was computed at the same time.
        self._identities = [-1] * num_blocks
        self._new_identity = count()
        self._indexed: set[int] = set()
        self.on_forgotten: Callable[[int], None] = lambda _identity: None

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that no sequence holds and whose content is still indexed."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that ``allocate`` could hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, tokens: Sequence[int], salt: Hashable) -> list[int]:
        """The blocks of the longest indexed prefix; never covers the last token, whose logits are always needed."""
        found: list[int] = []
        parent = salt
        for index in range((len(tokens) - 1) // self.block_size):
            block = self._index.get((parent, self._tokens_of(tokens, index)))
            if block is None:
                break
            found.append(block)
            parent = self._identities[block]
        return found

    def can_allocate(self, num_new: int, prefix: Sequence[int] = ()) -> bool:
        """Whether ``allocate`` with the same arguments succeeds."""
        revived = sum(1 for block in prefix if not self._references[block])
        return num_new + revived <= self.num_available

    def allocate(self, num_new: int, prefix: Sequence[int] = ()) -> list[int]:
        """Take a reference to each block of ``prefix``, and ``num_new`` blocks for new content; returns all of them."""
        assert self.can_allocate(num_new, prefix), "ask can_allocate first"
        # The prefix first: once held, it cannot be evicted to make room for the new blocks.
        for block in prefix:
            self._share(block)
        return [*prefix, *(self._take() for _ in range(num_new))]

    def register(self, blocks: Sequence[int], index: int, tokens: Sequence[int], salt: Hashable) -> None:
        """Index block ``index`` of a sequence: it is full and computed, and those before it are registered."""
        parent = self._identities[blocks[index - 1]] if index else salt
        key = (parent, self._tokens_of(tokens, index))
        block = blocks[index]
        twin = self._index.setdefault(key, block)
        if twin == block:
            self._keys[block] = key
            self._identities[block] = next(self._new_identity)
            self._indexed.add(self._identities[block])
        else:
            self._identities[block] = self._identities[twin]

    def identity(self, block: int) -> int:
        """What identifies the content of a registered block, also where that is indexed as another one's."""
        return self._identities[block]

    def is_indexed(self, identity: int) -> bool:
        """Whether ``find_prefix`` could find that content."""
        return identity in self._indexed

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a sequence; its tail will be evicted before its head."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that no block is lost or in two places; ``tables`` are the blocks of every sequence that holds any."""
        holders = [0] * self.num_blocks
        for block in chain.from_iterable(tables):
            holders[block] += 1
        assert self._references == holders, "reference counts differ from what the sequences hold"
        idle = {*self._free, *self._cached}
        assert len(idle) == self.num_available, "a block is free or cached twice"
        assert idle.isdisjoint(block for block, held in enumerate(holders) if held), "a used block is free"
        assert len(idle) == holders.count(0), "a block is lost"
        assert all(self._keys[block] is None for block in self._free), "a free block is indexed"
        assert all(self._keys[block] == key for key, block in self._index.items()), "a stale block is indexed"
        assert len(self._index) == self.num_blocks - self._keys.count(None), "a key leads nowhere"
        identities = {self._identities[block] for block in self._index.values()}
        assert self._indexed == identities, "an identity is known of what is not indexed"

    def _tokens_of(self, tokens: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(tokens[index * self.block_size : (index + 1) * self.block_size])

    def _share(self, block: int) -> None:
        if not self._references[block]:
            del self._cached[block]
        self._references[block] += 1

    def _take(self) -> int:
        block = self._free.pop() if self._free else self._evict()
        assert not self._references[block]
        self._references[block] = 1
        return block

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._keys[block]
        assert key is not None
        del self._index[key]
        self._keys[block] = None
        self._indexed.discard(self._identities[block])
        self.on_forgotten(self._identities[block])
        return block
