"""The tree of an answer's tokens, and the text that all of its living branches agree on.

Each token is a node; beams that fork share their past. A node knows its own piece of text only, so
that nothing is copied when beams fork and a token costs the same however long the answer is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vicuna.generate.events import Answer, FinishReason, TokenLogprob
from vicuna.generate.stream import StreamState


class Node:
    """One token of a branch, and so the branch that ends with it.

    parent: None for the root, which is the prompt's end and has no token.
    row: the row of the engine's last logits that the token was chosen from.
    score: sum of what the strategy added up for the tokens so far.
    piece: text that became certain with this token, from `offset` in the branch's text on.
    state: of the text stream behind this token.
    reason: why the branch is finished; None while it is open.
    logprob: the token's, where log-probabilities are asked for.
    """

    __slots__ = (
        "alive", "children", "length", "logprob", "offset", "parent", "piece", "reason", "row",
        "score", "state", "token_id",
    )  # fmt: skip

    def __init__(
        self,
        parent: Node | None = None,
        token_id: int = -1,
        row: int = 0,
        score: float = 0.0,
        logprob: TokenLogprob | None = None,
    ) -> None:
        self.parent, self.token_id, self.row = parent, token_id, row
        self.score, self.logprob = score, logprob
        self.length: int = parent.length + 1 if parent else 0
        self.offset: int = parent.offset + len(parent.piece) if parent else 0
        self.piece: str = ""
        self.state: StreamState = parent.state if parent else StreamState()
        self.reason: FinishReason | None = None
        self.children: list[Node] = []
        self.alive = True

    def back(self) -> Iterator[Node]:
        """The branch's tokens from the last to the first."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def text(self, start: int = 0) -> str:
        """The branch's text from `start` on; its cost is that of the nodes behind `start`."""
        pieces: list[str] = []
        for node in self.back():
            if node.offset < start:
                pieces.append(node.piece[start - node.offset :])
                break
            pieces.append(node.piece)
        return "".join(reversed(pieces))

    def token_ids(self) -> tuple[int, ...]:
        """The branch's tokens."""
        return tuple(node.token_id for node in self.back())[::-1]

    def answer(self, score: float, reason: FinishReason, rest: str = "") -> Answer:
        """The branch as a whole answer; `rest` is text behind its pieces."""
        logprobs = tuple(n.logprob for n in self.back() if n.logprob is not None)[::-1]
        return Answer(self.text() + rest, self.token_ids(), score, reason, logprobs or None)


class _Cursor(NamedTuple):
    """A place in the tree: before character `at` of a node's piece."""

    node: Node
    at: int


class StablePrefix:
    """The longest text that all contenders begin with.

    Contenders are the branches whose text may yet come first: all open ones, and the best finished
    one. (The other finished ones have lost to that one already: scores of finished branches stay.)
    A step replaces open contenders by their continuations, and a finished one only by a better
    one, so that what all contenders began with once, they always will: it never has to be taken
    back, and the final answer begins with it.

    The tree is cut by cursors at the end of the agreed text, one for each place in it where
    contenders go on. Each character is passed once; branches that die are taken out of the tree
    node by node. Cost over a whole answer: characters and tokens times contenders.
    """

    def __init__(self, root: Node) -> None:
        self.length = 0  # characters agreed on so far
        self._contenders: set[Node] = {root}
        self._cursors = [_Cursor(root, 0)]

    def update(self, contenders: Iterable[Node]) -> str:
        """Take the contenders after a step: those of before or their children.

        Returns: the text that is agreed on from now on.
        """
        before, self._contenders = self._contenders, set(contenders)
        for node in self._contenders - before:
            assert node.parent is not None
            node.parent.children.append(node)
        for node in before - self._contenders:
            self._prune(node)
        return "".join(self._advance())

    def _prune(self, node: Node) -> None:
        """Take a branch out of the tree, back to where another one left it."""
        while not node.children and node not in self._contenders and node.parent is not None:
            node.alive = False
            node.parent.children.remove(node)
            node = node.parent

    def _advance(self) -> Iterator[str]:
        while True:
            self._cursors = [c for old in self._cursors for c in _onward(old)]
            common = _common([node.piece[at:] for node, at in self._cursors])
            if not common:
                return
            self._cursors = [_Cursor(node, at + len(common)) for node, at in self._cursors]
            self.length += len(common)
            yield common


def _common(texts: list[str]) -> str:
    """What all texts begin with."""
    if not texts:
        return ""
    shortest = min(texts, key=len)
    for i, character in enumerate(shortest):
        if any(text[i] != character for text in texts):
            return shortest[:i]
    return shortest


def _onward(cursor: _Cursor) -> Iterator[_Cursor]:
    """The cursor, or where it came to its piece's end, those of the living nodes behind."""
    todo = [cursor]
    while todo:
        node, at = todo.pop()
        if not node.alive:
            continue
        if at < len(node.piece) or not node.children:
            yield _Cursor(node, at)
        else:
            todo += [_Cursor(child, 0) for child in node.children]
