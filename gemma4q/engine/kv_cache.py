"""Which page of keys and values holds what, for whom: handing out, sharing, reuse of prefixes, rollback.

A page holds 64 positions, aligned to absolute position. Pages come in pairs: a global one (layers that see everything)
and a local one (sliding layers). A `Block` is such a pair with the history that filled it; blocks form a tree in which
each path from the root is a history. A sequence holds a path; what nobody holds stays as a cache until its page is
needed. Global pages are kept for the whole context; a local page is let go when the window has left it behind, and a
prefix can be resumed only where the window's local pages are still there. History is one int64 a position (sequence.py
makes it from token, class and image content) and is itself compared, not a hash of it. What lies in a page is the
session's business.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from ..abi import PAGE
from ..errors import Gemma4qError

ROLLBACK = PAGE  # positions behind the furthest stored one that can always be taken back: more than any draft is long


def pages(positions: int) -> int:
    """Pages that positions 0 ... `positions` lie in."""
    return -(-positions // PAGE)


def global_pages(context: int, sequences: int) -> int:
    """Global pages for `sequences` of `context` positions each, and one to copy to."""
    return sequences * pages(context) + 1


def local_pages(window: int, sequences: int, rows: int) -> int:
    """Local pages that `sequences` need at once when a step holds `rows` positions of them all, and one to copy to."""
    return sequences * (pages(window - 1 + ROLLBACK) + 2) + pages(rows) + 1 if window else 0


@dataclass(eq=False)
class Block:
    """The first `count` of 64 positions of one history; `users` hold it, `local_users` of them its local page."""

    parent: "Block | None"
    global_page: int = -1
    local_page: int = -1
    count: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.zeros(PAGE, np.int64))
    users: int = 0
    local_users: int = 0
    kept: bool = False  # part of a checkpoint's window: its local page is evicted last
    children: list["Block"] = field(default_factory=list)

    def shared(self, keys: np.ndarray) -> int:
        """How many of its positions have the history `keys`."""
        count = min(self.count, len(keys))
        different = np.flatnonzero(self.keys[:count] != keys[:count])
        return int(different[0]) if len(different) else count


class KVCache:
    """The pages of one session, for any number of histories. Not thread-safe: one engine owns it."""

    def __init__(self, session, window: int):
        """`session` clears and copies pages; `window` is the sliding layers' (0: there are none)."""
        self.session, self.window, self.limits = session, window, session.limits
        # Whether prompt and generated rows meet different arithmetic: if so, their histories differ too.
        self.classes_differ = getattr(session, "classes_differ", False)
        self.root = Block(None, count=PAGE)
        self.blank = {False: list(range(self.limits.global_pages)), True: list(range(self.limits.local_pages))}
        # Blocks, and local pages of blocks, that nobody holds: the next victim first, children before their parents.
        self.idle: OrderedDict[Block, None] = OrderedDict()
        self.idle_local: OrderedDict[Block, None] = OrderedDict()

    def open(self, keys: np.ndarray, reach: np.ndarray | None = None) -> "History":
        """A history that begins with as much of `keys` as is cached, but not all: the last row must be computed.

        `reach`: the last position that each one sees (None: itself); a prefix never ends inside an image block.
        """
        path, matched = self._match(keys[:-1])
        history = History(self)
        try:
            history.resume(path, self._usable(path, matched, reach))
        except Gemma4qError:
            history.close()
            raise
        return history

    def _match(self, keys: np.ndarray) -> tuple[list[Block], int]:
        """The path that agrees longest with `keys`, and how long: its last block perhaps only in part."""
        path, matched, node = [], 0, self.root
        while matched == PAGE * len(path) < len(keys):
            rest = keys[matched : matched + PAGE]
            found = [(block.shared(rest), block.local_page >= 0, block) for block in node.children]
            shared, _, node = max(found, key=lambda f: f[:2], default=(0, False, node))
            if not shared:
                break
            path.append(node)
            matched += shared
        return path, matched

    def _usable(self, path: list[Block], length: int, reach: np.ndarray | None) -> int:
        """How much of a matched path can be resumed: whole image blocks, and every local page of the window there."""
        while length:
            if reach is not None:
                complete = np.flatnonzero(reach[:length] < length)
                length = int(complete[-1]) + 1 if len(complete) else 0
            needed = range(self.first_local(length), pages(length)) if self.window else ()
            missing = [i for i in needed if path[i].local_page < 0]
            if not missing:
                break
            length = missing[-1] * PAGE
        return length

    def first_local(self, length: int) -> int:
        """The first block that a row at position `length` sees in sliding layers."""
        return max(0, length - self.window + 1) // PAGE

    def new_block(self, parent: Block) -> Block:
        """A block with pages of its own, as they were left."""
        block = Block(parent, self._take(False))
        if self.window:
            try:
                block.local_page = self._take(True)
            except Gemma4qError:
                self.blank[False].append(block.global_page)
                raise
            self.idle_local[block] = None
        parent.children.append(block)
        self.idle[block] = None
        return block

    def copy_of(self, source: Block, used: int) -> Block:
        """A block that agrees with `source` in its first `used` positions. The caller holds `source` and its pages."""
        copy = self.new_block(source.parent)
        self.session.copy_page(False, source.global_page, copy.global_page)
        if self.window:
            self.session.copy_page(True, source.local_page, copy.local_page)
        copy.keys[:used], copy.count = source.keys[:used], used
        return copy

    def _take(self, local: bool) -> int:
        """A page that nobody holds; if none is blank, the one that has been of no use for longest."""
        if not self.blank[local]:
            idle = self.idle_local if local else self.idle
            if not idle:
                kind = "sliding" if local else "global"
                raise Gemma4qError("cache_full", f"all pages of {kind} keys and values are in use: run fewer sequences")
            (self._drop_local if local else self.forget)(next(iter(idle)))
        return self.blank[local].pop()

    def _drop_local(self, block: Block) -> None:
        if block.local_page >= 0:
            self.idle_local.pop(block)
            self.blank[True].append(block.local_page)
            block.local_page = -1

    def forget(self, block: Block) -> None:
        """Takes a block that nobody holds, and all that follow it, out of the tree; their pages become blank."""
        block.parent.children.remove(block)
        doomed = [block]
        for each in doomed:
            doomed += each.children
            self._drop_local(each)
            self.idle.pop(each)
            self.blank[False].append(each.global_page)

    def hold(self, block: Block) -> None:
        block.users += 1
        self.idle.pop(block, None)

    def release(self, block: Block) -> None:
        block.users -= 1
        if not block.users:
            self.idle[block] = None

    def hold_local(self, block: Block) -> None:
        block.local_users += 1
        self.idle_local.pop(block, None)

    def release_local(self, block: Block, keep: bool) -> None:
        """`keep`: a later history may well resume here, so take other pages first."""
        block.local_users -= 1
        if not block.local_users:
            self.idle_local[block] = None
            self.idle_local.move_to_end(block, last=keep)


class History:
    """What one sequence holds: `length` stored positions, in blocks whose pages two tables list by position / 64.

    A table entry of -1 is a page that no row of the sequence needs any more, or not yet.
    """

    def __init__(self, cache: KVCache):
        self.cache, self.blocks, self.length = cache, [], 0
        self.first_held = 0  # the first block whose local page is held
        self.global_table = np.full(cache.limits.table, -1, np.int32)
        self.local_table = np.full(cache.limits.table, -1, np.int32)

    def tables(self, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Global and local pages of positions 0 ... end."""
        return self.global_table[: pages(end)], self.local_table[: pages(end)]

    def resume(self, path: list[Block], length: int) -> None:
        """Begins with the first `length` positions of `path`; a page that others need, or its rest, is copied."""
        for block in path[: pages(length)]:
            self._append(block)
        self.length = length
        self.first_held = self.cache.first_local(length)
        self._hold_from(self.first_held)
        used = length % PAGE
        if used and (self.blocks[-1].users > 1 or self.blocks[-1].count > used):
            self._fork(used)

    def extend(self, count: int) -> None:
        """Makes room for `count` positions behind the stored ones; `commit` says that they are stored."""
        end, context = self.length + count, self.cache.limits.context
        if end > context:
            raise Gemma4qError("context_length_exceeded", f"{end} positions do not fit in a context of {context}")
        while len(self.blocks) * PAGE < end:
            block = self.cache.new_block(self.blocks[-1] if self.blocks else self.cache.root)
            self._append(block)
            self._hold_local(len(self.blocks) - 1)
            self.cache.session.clear_pages(False, np.array([block.global_page], np.int32))
            if self.cache.window:
                self.cache.session.clear_pages(True, np.array([block.local_page], np.int32))

    def commit(self, keys: np.ndarray) -> None:
        """The next len(keys) positions are stored; lets go of local pages that the window has left behind."""
        done = 0
        while done < len(keys):
            block, at = self.blocks[self.length // PAGE], self.length % PAGE
            part = keys[done : done + PAGE - at]
            block.keys[at : at + len(part)] = part
            block.count = at + len(part)
            done, self.length = done + len(part), self.length + len(part)
        first = self.cache.first_local(max(0, self.length - ROLLBACK)) if self.cache.window else 0
        while self.first_held < first:
            self._release_local(self.first_held, self.blocks[self.first_held].kept)
            self.first_held += 1

    def checkpoint(self) -> None:
        """A later history is likely to part from this one here: the window's local pages are evicted last."""
        for block in self.blocks[self.cache.first_local(self.length) : pages(self.length)]:
            block.kept = True

    def rollback(self, count: int) -> None:
        """Takes the last `count` positions back: ROLLBACK always, more while the window's pages are still there."""
        length = self.length - count
        first, used = self.cache.first_local(length), length % PAGE
        needed = self.blocks[first : pages(length)] if self.cache.window else ()
        if count < 0 or length < 0 or any(block.local_page < 0 for block in needed):
            raise Gemma4qError("bad_rollback", f"{count} of {self.length} stored positions cannot be taken back")
        while len(self.blocks) > pages(length):
            block = self._pop(keep=False)
            if not block.users and block.count < PAGE:
                self.cache.forget(block)
        self.length = length
        self.first_held = min(self.first_held, first)
        self._hold_from(first)
        if used and self.blocks[-1].count > used:
            self._cut(used)

    def close(self, failed: bool = False) -> None:
        """Lets go of everything; what is stored stays cached. `failed`: a step left its pages in an unknown state."""
        stored = self.length // PAGE if failed else pages(self.length)
        while self.blocks:
            block = self._pop(keep=True)
            if len(self.blocks) >= stored and not block.users:
                self.cache.forget(block)
        self.length = 0

    def _cut(self, used: int) -> None:
        """The last block ends after `used` positions: in place, unless somebody else needs the rest."""
        block = self.blocks[-1]
        if block.users > 1:  # whoever holds a child holds this one too
            self._fork(used)
            return
        for child in list(block.children):
            self.cache.forget(child)
        block.count = used

    def _fork(self, used: int) -> None:
        """Goes on in a copy of the last block's first `used` positions."""
        copy = self.cache.copy_of(self.blocks[-1], used)
        self._pop(keep=True)
        self._append(copy)
        self._hold_local(len(self.blocks) - 1)

    def _append(self, block: Block) -> None:
        self.cache.hold(block)
        self.global_table[len(self.blocks)] = block.global_page
        self.blocks.append(block)

    def _pop(self, keep: bool) -> Block:
        i = len(self.blocks) - 1
        if self.local_table[i] >= 0:
            self._release_local(i, keep)
        self.global_table[i] = -1
        block = self.blocks.pop()
        self.cache.release(block)
        return block

    def _hold_from(self, first: int) -> None:
        for i in range(first, len(self.blocks)):
            self._hold_local(i)

    def _hold_local(self, i: int) -> None:
        if self.cache.window and self.local_table[i] < 0:
            self.cache.hold_local(self.blocks[i])
            self.local_table[i] = self.blocks[i].local_page

    def _release_local(self, i: int, keep: bool) -> None:
        self.local_table[i] = -1
        self.cache.release_local(self.blocks[i], keep)
