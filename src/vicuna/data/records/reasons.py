"""The reasons a user reads of what happened to a record, beside those of `textrules`, `checks` and
`kinds`. Stable; a detail may follow after ": "."""

from __future__ import annotations

from collections.abc import Callable

from vicuna.data.conversation import Action

# Turns, and their order.
NO_ANSWER = "no answer"
EMPTY_ANSWER = "empty answer"
PLACEHOLDER_ANSWER = "placeholder answer"
NO_QUESTION = "no question"
EMPTY_QUESTION = "empty question"
QUESTION_FROM_INPUT = "question taken from the input"
EMPTY_CONVERSATION = "empty conversation"
SYSTEM_MOVED = "system turn moved to the front"
SYSTEM_LEFT_OUT = "system turn at the end left out"
LEADING_ANSWER = "leading assistant turn dropped"
MERGED = "turns of the same role merged"
OPEN_QUESTION = "question without an answer dropped"
CUT = "conversation cut here"
MEDIA = "image, audio or video"
NOT_LEARNED = "marked as not to be learned"

# Keys that change what a record means.
TOOL = "tool call"
BAD_ANSWER = "marked as a bad answer"
WEIGHT = "weight taken as 1"
LABEL_ODD = "label not understood, the answer is taught"
MASK_ODD = "loss mask not understood"

# Thoughts.
THOUGHT_TWICE = "thought given twice, taken once"
THOUGHTS_JOINED = "thought beside the answer and in it, joined"

# What readers of formats find.
NOT_A_TURN = "not a turn"
UNKNOWN_ROLE = "unknown role"
MORE_ANSWERS = "more answers than questions"
ONE_TURN = "text instead of a list, taken as one turn"
DIALOGUE = "dialogue in one text, read as turns"
PRINTED_LIST = "list as Python prints it, read"

# Preferences.
BEST = "best of several answers"
REPLACED = "answer before the chosen one left out"
FIRST = "first of several answers"
NO_WINNER = "several answers, and it is not said which is better"

# Multiple choice.
OPTION_NUMBER = "number of an option, counted from 0, taken as its letter"
NO_SUCH_OPTION = "no such option"

# Forms that are known and cannot be read.
TREE_MESSAGE = "one message of an OpenAssistant tree (take the file of trees, or join the messages)"
TOKEN_IDS = "token ids instead of text (give the texts they were made from)"
SEGMENTS = "axolotl's segments without a template (write them as messages)"
PASSAGES = "SQuAD's passages with many questions (write one question and answer a record)"
ONLY_TEXT_PAIR = "a question with passages to rank, not an answer (this trains retrieval, not chat)"
LABEL_STUDIO = "an annotation task of Label Studio (export it as JSON-MIN or CSV)"

# Records as a whole.
UNKNOWN_FORMAT = "unknown format"
WRAPPED = "record wrapped in a list"
INSIDE = "record taken out of a field"
NO_TEXT = "no text"
EMPTY_TEXT = "empty text"

# Objects that hold the records of a file.
LIST_INSIDE = "records taken out of a list inside"
BY_ID = "records taken from under their ids"
COLUMNS = "records put together from columns"
SPLIT = "records put together from rows and their columns"
OTHER_LIST = "another list inside, not read"


# The reasons a user reads. Stable; a detail may follow after ": ".
BROKEN_JSON = "broken JSON"


PYTHON = "Python's notation instead of JSON"


DUPLICATE_KEY = "duplicate key"


NUMBER = "number taken as text"


NOT_TEXT = "not text"


LONE_SURROGATE = "lone surrogate (half of a broken character)"


ZERO_WIDTH = "zero-width characters removed"


LOST_CHARACTERS = "characters lost in an earlier conversion (U+FFFD)"


LITERAL_NEWLINE = "literal \\n instead of a line break"


PLACEHOLDER_INPUT = "placeholder input emptied"


# The reasons a user reads. Stable; a detail may follow after ": ".
NO_CHINESE = "no Chinese text"


OTHER_TEMPLATE = "another template's marks in the text"


MOJIBAKE = "text decoded with the wrong encoding"


PLACEHOLDER = "placeholder left in the text"


SHIFTED = "user turn speaks as an assistant, roles may be shifted"


THOUGHT = "thought in other marks, taught as text"


SAME = "answer identical to the question"


Note = Callable[[str, str, Action], None]


class Unusable(Exception):
    """The record cannot be used: which field, and why."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(field, reason)


def shorten(words: str, width: int = 60) -> str:
    """Words from the data, short enough for a table."""
    return words if len(words) <= width else words[: width - 3] + "..."
