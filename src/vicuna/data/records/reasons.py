"""Why a record was dropped, repaired or warned of: the reasons that the user reads.

They are stable; a detail may follow after ": ". What is wrong with a whole file is in
`file_types.py`. `Unusable` drops a record, `Note` reports anything else.
"""

from __future__ import annotations

from collections.abc import Callable

from vicuna.data.conversation import Action
from vicuna.messages import Message

# Turns, and their order.
NO_ANSWER = Message("no answer")
EMPTY_ANSWER = Message("empty answer")
PLACEHOLDER_ANSWER = Message("placeholder answer")
NO_QUESTION = Message("no question")
EMPTY_QUESTION = Message("empty question")
QUESTION_FROM_INPUT = Message("question taken from the input")
EMPTY_CONVERSATION = Message("empty conversation")
SYSTEM_MOVED = Message("system turn moved to the front")
SYSTEM_LEFT_OUT = Message("system turn at the end left out")
LEADING_ANSWER = Message("leading assistant turn dropped")
MERGED = Message("turns of the same role merged")
OPEN_QUESTION = Message("question without an answer dropped")
CUT = Message("conversation cut here")
MEDIA = Message("image, audio or video")
NOT_LEARNED = Message("marked as not to be learned")

# Keys that change what a record means.
TOOL = Message("tool call")
BAD_ANSWER = Message("marked as a bad answer")
WEIGHT = Message("weight taken as 1")
LABEL_ODD = Message("label not understood, the answer is taught")
MASK_ODD = Message("loss mask not understood")

# Thoughts.
THOUGHT_TWICE = Message("thought given twice, taken once")
THOUGHTS_JOINED = Message("thought beside the answer and in it, joined")

# What readers of formats find.
NOT_A_TURN = Message("not a turn")
UNKNOWN_ROLE = Message("unknown role")
MORE_ANSWERS = Message("more answers than questions")
ONE_TURN = Message("text instead of a list, taken as one turn")
DIALOGUE = Message("dialogue in one text, read as turns")
PRINTED_LIST = Message("list as Python prints it, read")

# Preferences.
BEST = Message("best of several answers")
REPLACED = Message("answer before the chosen one left out")
FIRST = Message("first of several answers")
NO_WINNER = Message("several answers, and it is not said which is better")

# Multiple choice.
OPTION_NUMBER = Message("number of an option, counted from 0, taken as its letter")
NO_SUCH_OPTION = Message("no such option")

# Forms that are known and cannot be read.
TREE_MESSAGE = Message(
    "one message of an OpenAssistant tree (take the file of trees, or join the messages)"
)
TOKEN_IDS = Message("token ids instead of text (give the texts they were made from)")
SEGMENTS = Message("axolotl's segments without a template (write them as messages)")
PASSAGES = Message("SQuAD's passages with many questions (write one question and answer a record)")
ONLY_TEXT_PAIR = Message(
    "a question with passages to rank, not an answer (this trains retrieval, not chat)"
)
LABEL_STUDIO = Message("an annotation task of Label Studio (export it as JSON-MIN or CSV)")

# Records as a whole.
UNKNOWN_FORMAT = Message("unknown format")
WRAPPED = Message("record wrapped in a list")
INSIDE = Message("record taken out of a field")
NO_TEXT = Message("no text")
EMPTY_TEXT = Message("empty text")

# Objects that hold the records of a file.
LIST_INSIDE = Message("records taken out of a list inside")
BY_ID = Message("records taken from under their ids")
COLUMNS = Message("records put together from columns")
SPLIT = Message("records put together from rows and their columns")
OTHER_LIST = Message("another list inside, not read")

# JSON text, and single strings.
BROKEN_JSON = "broken JSON"
PYTHON = Message("Python's notation instead of JSON")
DUPLICATE_KEY = Message("duplicate key")
NUMBER = Message("number taken as text")
NOT_TEXT = Message("not text")
LONE_SURROGATE = Message("lone surrogate (half of a broken character)")
ZERO_WIDTH = Message("zero-width characters removed")
LOST_CHARACTERS = Message("characters lost in an earlier conversion (U+FFFD)")
LITERAL_NEWLINE = Message("literal \\n instead of a line break")
PLACEHOLDER_INPUT = Message("placeholder input emptied")

# What parses and still hurts.
NO_CHINESE = Message("no Chinese text")
OTHER_TEMPLATE = Message("another template's marks in the text")
MOJIBAKE = Message("text decoded with the wrong encoding")
PLACEHOLDER = Message("placeholder left in the text")
SHIFTED = Message("user turn speaks as an assistant, roles may be shifted")
THOUGHT = Message("thought in other marks, taught as text")
SAME = Message("answer identical to the question")
Note = Callable[[str, str, Action], None]


class Unusable(Exception):
    """The record cannot be used: which field, and why."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(field, reason)


def shorten(words: str, width: int = 60) -> str:
    """Words from the data, short enough for a table."""
    return words if len(words) <= width else words[: width - 3] + "..."
