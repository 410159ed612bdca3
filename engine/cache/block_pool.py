"""Where keys and values live: a fixed pool of blocks with reference counts and a prefix cache. No torch."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from itertools import chain

from engine.api.block_groups import Window

_KEY_BYTES = 32


def extend_keys(
    keys: list[bytes], count: int, tokens: Sequence[int], block_size: int, salt: str, *, is_long: bool = False
) -> None:
    """Bring ``keys``, those of the first full blocks of a sequence, to ``count`` of them.

    A key identifies a block's tokens and all tokens before them under a ``salt``, and whether they are computed as
    those of a long text (``Sequence.is_long``): it is a cryptographic digest of the key before it and the block's
    tokens, so no two contents have the same one.
    """
    if keys:
        key = keys[-1]
    else:
        key = blake2b(salt.encode(), digest_size=_KEY_BYTES, person=b"long" if is_long else b"").digest()
    for index in range(len(keys), count):
        own = array("q", tokens[index * block_size : (index + 1) * block_size])
        assert len(own) == block_size, "only full blocks have a key"
        key = blake2b(key + own.tobytes(), digest_size=_KEY_BYTES).digest()
        keys.append(key)


class BlockPool:
    """A fixed number of blocks of ``block_size`` tokens for layers with one ``window``, each in one of three places.

    - used: held by at least one sequence (reference count > 0);
    - cached: held by no sequence, but its content is still indexed; reused for new content, least recently used first;
    - free: without indexed content.

    Content is indexed by its key (``extend_keys``). ``on_forgotten`` is called with a key whose content is indexed no
    longer.
    """

    def __init__(self, num_blocks: int, block_size: int, window: Window | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.window = window
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._index: dict[bytes, int] = {}
        self._keys: list[bytes | None] = [None] * num_blocks
        self._found: set[int] = set()  # blocks that a second sequence began with
        self.on_forgotten: Callable[[bytes], None] = lambda _key: None

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

    def first_block(self, position: int) -> int:
        """The first block of its sequence that the token at ``position`` sees."""
        return self.window.first_seen(position) // self.block_size if self.window else 0

    def most_held(self, launched: int) -> int | None:
        """The most blocks that a sequence holds of which ``launched`` tokens are computed at once; None: all."""
        return self.window.most_blocks(launched, self.block_size) if self.window else None

    def find(self, key: bytes) -> int | None:
        """The block whose content has that key, if it is indexed."""
        return self._index.get(key)

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

    def register(self, block: int, key: bytes) -> None:
        """Index a block that is full and computed. Of two with the same content the first one stays indexed."""
        if self._index.setdefault(key, block) == block:
            self._keys[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a sequence; its tail will be evicted before its head."""
        for block in reversed(blocks):
            self._drop(block)

    def release_passed(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block that a sequence, which goes on, sees no longer.

        They are reused before all others, or one long text would flush what conversations will go on with, unless they
        were found by a second sequence already.
        """
        for block in reversed(blocks):
            self._drop(block)
            if block in self._cached and block not in self._found:
                self._cached.move_to_end(block, last=False)

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
        assert self._found <= set(self._index.values()), "a block was found that is not indexed"

    def _share(self, block: int) -> None:
        if not self._references[block]:
            del self._cached[block]
        self._references[block] += 1
        self._found.add(block)

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block]:
            return
        if self._keys[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

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
        self._found.discard(block)
        self.on_forgotten(key)
        return block
