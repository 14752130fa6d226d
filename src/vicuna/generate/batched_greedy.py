"""Several prompts answered at once, greedily, over any engine that grows a tree.

The prefix that all prompts share is computed once. After it each prompt is a branch, and all grow
by one token a step: first by what is left of the prompt, then by its answer. A step over many rows
takes hardly longer than over one, because the weights are read once.

    prefix   <s> user: |
    row 0              | 你 好 assistant: *  *  *  *         the answer, while others still read
    row 1              | 写 一 首 诗 assistant: *  *
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import torch

from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError
from vicuna.generate.engines.base import Cancelled, Engine, OutOfMemory, never
from vicuna.generate.events import Answer, FinishReason
from vicuna.generate.strategies import BranchBuilder
from vicuna.generate.stream import TextStream
from vicuna.generate.tree import Node


def answer_together(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    longest: int,
    renderer: Renderer,
    cancel: Callable[[], bool] = never,
    go_on: Callable[[int, str], bool] = lambda _, __: True,
) -> list[Answer]:
    """The greedy answers: those of `complete`, up to the rounding of a product of more rows.

    Args:
        prompts: token ids, each shorter than the engine's context; at most `engine.max_rows`.
        longest: tokens of the longest answer.
        cancel: asked before each step; once true, answers end with what was said.
        go_on: asked after each step with a prompt's number and the text of its answer so far; where
            it says no, that answer ends there ("cancelled").

    Raises: UserError where the logits are no numbers.
    """
    shared = _shared(prompts)
    ends = frozenset(renderer.stop_ids)
    stream = TextStream(renderer.tokenizer)
    builders = [
        BranchBuilder(stream, ends, longest, engine.context_length - len(p)) for p in prompts
    ]
    waiting = [list(p[shared:]) for p in prompts]
    nodes = [Node() for _ in prompts]
    broken: FinishReason = "cancelled"
    try:
        logits = engine.prefill(prompts[0][:shared], cancel)[None].expand(len(prompts), -1)
        live, begun = list(range(len(prompts))), False
        while True:
            tokens = _grow(logits, live, waiting, nodes, builders)
            open_rows = [k for k, row in enumerate(live) if not nodes[row].reason]
            kept = [k for k in open_rows if go_on(live[k], nodes[live[k]].text())]
            if not kept:
                break
            if cancel():
                raise Cancelled
            # First every row forks from the shared prefix's end, then each grows from itself.
            logits = engine.step([tokens[k] for k in kept], kept if begun else [0] * len(kept))
            live, begun = [live[k] for k in kept], True
    except Cancelled:
        pass
    except OutOfMemory:
        broken = "memory"
    return [
        node.answer(0.0, node.reason)
        if node.reason
        else node.answer(0.0, broken, builder.rest(node))
        for node, builder in zip(nodes, builders)
    ]


def _grow(
    logits: torch.Tensor,
    live: Sequence[int],
    waiting: Sequence[list[int]],
    nodes: list[Node],
    builders: Sequence[BranchBuilder],
) -> list[int]:
    """The next token of each live row: of its prompt, or the best one, which grows its answer."""
    best = logits.argmax(-1).tolist()
    tokens = []
    for k, row in enumerate(live):
        if waiting[row]:
            tokens.append(waiting[row].pop(0))
            continue
        if not bool(torch.isfinite(logits[k, best[k]])):
            raise UserError("the model's logits are not finite")
        nodes[row] = builders[row].grow(nodes[row], row, best[k], 0.0, None)
        tokens.append(best[k])
    return tokens


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with."""
    first = prompts[0]
    most = min(map(len, prompts))
    return sum(1 for _ in takewhile(lambda i: all(p[i] == first[i] for p in prompts), range(most)))


def groups(prompts: Sequence[Sequence[int]], rows: int, longest: int) -> Iterator[list[int]]:
    """Which prompts to answer together: at most `rows`, with something in common, and none whose
    rest takes so many steps that reading it at once and answering it alone is quicker."""
    alone: list[int] = []
    together: list[int] = []
    shared = _shared(prompts)
    for n, prompt in enumerate(prompts):
        (together if shared and len(prompt) - shared <= 2 * longest else alone).append(n)
    for start in range(0, len(together), rows):
        yield together[start : start + rows]
    yield from ([n] for n in alone)
