"""The order of turns: from the utterances of a record to user and assistant in alternation."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from vicuna.data.conversation import Role, Turn
from vicuna.data.records.clean import clean, is_placeholder_answer, is_placeholder_input
from vicuna.data.records.reasons import (
    CUT,
    EMPTY_ANSWER,
    EMPTY_CONVERSATION,
    EMPTY_QUESTION,
    LEADING_ANSWER,
    MEDIA,
    MERGED,
    NO_ANSWER,
    NO_QUESTION,
    NOT_LEARNED,
    OPEN_QUESTION,
    PLACEHOLDER_ANSWER,
    PLACEHOLDER_INPUT,
    QUESTION_FROM_INPUT,
    SYSTEM_LEFT_OUT,
    SYSTEM_MOVED,
    THOUGHT_TWICE,
    THOUGHTS_JOINED,
    Note,
    Unusable,
)
from vicuna.data.think_tags import split_thought
from vicuna.messages import Message

# Marks that stand for what a text model cannot see. The first kind is a mark wherever it stands;
# the second may also be talked about, so it counts where a text begins or ends with it, or on a
# line of its own.
_MEDIA_MARK = re.compile(
    r"<\|(?:image|audio|video|vision)[a-z_]*(?:_\d+)?\|>|<(?:image|audio|video|img)_?\d+>"
    r"|<(?:image|video|audio)_?(?:placeholder|here|pad|token|soft_token)>|<imagehere>|<img>[^<\n]*</img>"
    r"|<start_of_image>"
    r"|\A\s*<(?:image|images|audio|video|speech|img)>|<(?:image|images|audio|video|speech|img)>\s*\Z"
    r"|^[ \t]*<(?:image|images|audio|video|speech|img)>[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)


class Utterance(NamedTuple):
    """Something somebody said, as it stands in the record.

    learned: False for an answer that is context only.
    """

    role: Role
    value: Any
    field: str
    input: Any = None
    input_field: str = ""
    thought: Any = None
    in_loss: bool = True


def ordered_turns(utterances: list[Utterance], note: Note) -> list[Turn]:
    """Turns in order: an optional system turn, then user and assistant in strict alternation.

    No turn ever changes its role. What is in the way is merged, moved, left out or cut off with a
    note: answers before the first question, neighbours of one role, a question at the end. From an
    answer or question without words on, the rest of the conversation is cut off; where no whole
    exchange came before it, the record is dropped.
    """
    turns: list[Turn] = []
    cut = any_outside_loss = False
    for s in utterances:
        turn, missing = _turn(s, note)
        if not s.in_loss:
            any_outside_loss = True
        last = turns[-1].role if turns else "system"
        if turn.role == "system":
            if not turn.text or (last == "system" and turns and turn.text == turns[-1].text):
                continue
            if last != "system":
                _move(turns, turn, s, utterances, note)
                continue
        elif turn.role == "assistant" and last == "system":
            note(s.field, LEADING_ANSWER, "repaired")
            continue
        elif fault := _fault(turn, missing):
            if all(t.role != "assistant" for t in turns):
                raise Unusable(s.field, fault)
            note(s.field, Message("{reason}: {fault}", reason=CUT, fault=fault), "repaired")
            cut = True
            break
        if turns and last == turn.role:
            turns[-1] = _merged(turns[-1], turn)
            note(s.field, MERGED, "repaired")
        else:
            turns.append(turn)
    if turns and turns[-1].role == "user":
        turns.pop()
        if not turns or turns[-1].role == "system":
            raise Unusable(utterances[-1].field, NO_ANSWER)
        if not cut:
            note(utterances[-1].field, OPEN_QUESTION, "repaired")
    if not turns or turns[-1].role == "system":
        raise Unusable(
            utterances[0].field if utterances else "",
            NO_QUESTION if utterances else EMPTY_CONVERSATION,
        )
    if any_outside_loss and not any(t.in_loss for t in turns if t.role == "assistant"):
        raise Unusable(utterances[-1].field, NOT_LEARNED)
    return turns


def _move(
    turns: list[Turn], system: Turn, s: Utterance, utterances: list[Utterance], note: Note
) -> None:
    """A system prompt that stands behind other turns, to the front.

    The answers before it were given without it: they stay as context and are not learned. At the
    end it rules nothing: there it is taken for the record's own if that has no other.
    """
    answered = any(t.role == "assistant" for t in turns)
    ends = all(other.role == "system" for other in utterances[utterances.index(s) :])
    own = turns[0].role != "system"
    if ends and answered and not own:
        note(s.field, SYSTEM_LEFT_OUT, "repaired")
        return
    detail = ""
    if answered and not ends:
        detail = ": answers before it are not learned"
        turns[:] = [_outside_loss(t) for t in turns]
    note(s.field, SYSTEM_MOVED + detail, "repaired")
    if own:
        turns.insert(0, system)
    elif turns[0].text != system.text:
        turns[0] = _merged(turns[0], system)


def _outside_loss(turn: Turn) -> Turn:
    if turn.role == "assistant":
        turn.in_loss = False
    return turn


def _turn(s: Utterance, note: Note) -> tuple[Turn, bool]:
    """One turn with clean text, and whether its text was missing."""
    text = clean(s.value, s.field, note)
    turn = Turn(s.role, text or "")
    if s.input is not None:
        turn.input = clean(s.input, s.input_field, note) or ""
        if turn.input and is_placeholder_input(turn.input):
            note(s.input_field, PLACEHOLDER_INPUT, "repaired")
            turn.input = ""
        if turn.input and not turn.text:
            note(s.input_field, QUESTION_FROM_INPUT, "repaired")
            turn.text, turn.input = turn.input, ""
        if turn.input and "<" in turn.input:
            _refuse_media(turn.input, s.input_field)
    if s.role == "assistant":
        if s.thought is not None:
            thought = clean(s.thought, Message("{field} (thought)", field=s.field), note) or ""
            turn.thought = "" if is_placeholder_answer(thought) else thought
            if turn.thought and "<think>" in turn.text[:100]:
                _one_thought(turn, s.field, note)
        if not s.in_loss:
            turn.in_loss = False
    elif "<" in turn.text:
        _refuse_media(turn.text, s.field)
    return turn, text is None


def _one_thought(turn: Turn, field: str, note: Note) -> None:
    """Of a thought beside an answer and a block at its beginning, one thought."""
    inside, answer = split_thought(turn.text)
    if answer == turn.text or not answer.strip():
        return
    turn.text = answer
    if inside.strip() in ("", turn.thought.strip()):
        note(field, THOUGHT_TWICE, "repaired")
    else:
        turn.thought = _joined(turn.thought, inside)
        note(field, THOUGHTS_JOINED, "repaired")


def _refuse_media(words: str, field: str) -> None:
    if match := _MEDIA_MARK.search(words):
        raise Unusable(
            field,
            Message("{reason}: {match} in the text", reason=MEDIA, match=match[0].strip()[:40]),
        )


def _fault(turn: Turn, missing: bool) -> str:
    """Why a turn has nothing to say; "" where it has."""
    if turn.role == "user":
        return "" if turn.text else NO_QUESTION if missing else EMPTY_QUESTION
    if not turn.text:
        return NO_ANSWER if missing else EMPTY_ANSWER
    return PLACEHOLDER_ANSWER if is_placeholder_answer(turn.text) else ""


def _joined(*words: str) -> str:
    return "\n".join(w for w in words if w)


def _merged(one: Turn, two: Turn) -> Turn:
    """Two turns of one role as one; it is learned only if both are."""
    return Turn(
        one.role,
        f"{one.text}\n{two.text}",
        _joined(one.input, two.input),
        _joined(one.thought, two.thought),
        one.in_loss and two.in_loss,
    )
