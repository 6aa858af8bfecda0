"""Reads cells of published files as text, numbers, lists, mappings or nothing; anything else is refused.

Files of one data set differ from mirror to mirror: columns are binary, chats hold parts, empty cells are NaN. An error
quotes the cell and says what it must be; the code that reads the file adds the file, the row and the column.
"""

from __future__ import annotations

import math
import reprlib
from decimal import Decimal
from typing import Any

_LONGEST = 120
"""The most characters of a quoted cell."""
_quoting = reprlib.Repr()
_quoting.maxstring = _quoting.maxother = 60
_quoting.maxlevel = 3

_USERS = (None, "user", "human")
_TEXT = "text in UTF-8"
_QUESTION = "text, a user's message, or a chat that ends with one"


def refused(cell: Any, right: str) -> ValueError:
    """The error for a cell: quotes it, on one line, and says what would be right."""
    quoted = " ".join(_quoting.repr(cell).split())
    return ValueError(f"is {quoted[:_LONGEST]}{'...' if len(quoted) > _LONGEST else ''}; it must be {right}")


def plain(cell: Any) -> Any:
    """A cell as text, a number, a list or a mapping; None for an empty one, which NaN is too.

    Bytes are text if they are UTF-8 without a NUL; a decimal becomes the text of its digits. The contents of a list or
    a mapping are left as they are.

    Raises:
      ValueError: the cell holds other bytes, text that UTF-8 cannot encode (half of a surrogate pair), a bool, an
        infinity, or a value of another type, such as a date.
    """
    match cell:
        case bytes() | str():
            return _utf8(cell)
        case float() if math.isnan(cell):
            return None
        case Decimal():
            return f"{cell:f}"
        case None | list() | tuple() | dict():
            return cell
        case int() | float() if not isinstance(cell, bool) and abs(cell) != math.inf:
            return cell
    raise refused(cell, "text, a finite number or a list of them")


def _utf8(cell: bytes | str) -> str:
    try:
        text = cell.decode() if isinstance(cell, bytes) else cell
        text.encode()
    except UnicodeError:
        raise refused(cell, _TEXT) from None
    if isinstance(cell, bytes) and "\0" in text:
        raise refused(cell, _TEXT)
    return text


def text_of(cell: Any) -> str:
    """The text of a cell; "" for an empty one.

    Raises:
      ValueError: the cell holds anything else.
    """
    match plain(cell):
        case None:
            return ""
        case str() as text:
            return text
    raise refused(cell, _TEXT)


def question_of(cell: Any) -> str:
    """The question in a cell, stripped: its text, or that of a message, or of a chat's last message; "" for none.

    A message is a mapping with a "role" and "content", one of which may be absent; its content is text, or a list of
    parts of type text, a line each. A list of one text is that text.

    Raises:
      ValueError: the cell holds anything else, or a message that is not a user's.
    """
    match plain(cell):
        case None | []:
            return ""
        case str() as text:
            return text.strip()
        case [str() | bytes() as text]:
            return text_of(text).strip()
        case dict() as message:
            return _content(message).strip()
        case [*messages] if all(isinstance(message, dict) for message in messages):
            return _content(messages[-1]).strip()
    raise refused(cell, _QUESTION)


def _content(message: dict[str, Any]) -> str:
    if not message.keys() & {"role", "content"} or plain(message.get("role")) not in _USERS:
        raise refused(message, _QUESTION)
    match plain(message.get("content")):
        case [*parts]:
            return "\n".join(map(_part, parts))
        case content:
            return text_of(content)


def _part(part: Any) -> str:
    match plain(part):
        case str() as text:
            return text
        case {"text": text, **others} if plain(others.get("type")) in (None, "text"):
            return text_of(text)
    raise refused(part, "a part of type text")
