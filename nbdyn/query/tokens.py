"""Tokens of a statement, read on demand, and errors with a caret under the place."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nbdyn.errors import QueryError, nearest

MAX_LENGTH = 4000
"""Characters in one statement, at most."""

_BLANK = re.compile(r"(?:\s|#[^\n]*)*")
_TOKEN = re.compile(
    r"(?P<number>(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)"
    r"|(?P<name>[^\W\d]\w*)"
    r"|(?P<quoted>`[^`]+`)"
    r"|(?P<symbol>\.\.|<=|>=|==|!=|[-+*/%|(),<>=])"
)
_SELECTOR = re.compile(r"(`[^`]+`|[\w*?.]+)(?:\s*(\[[^\]`]*\]))?")
_RUN = re.compile(r"`([^`]+)`|([\w./:~@+-]+)")


class UnfinishedStatement(QueryError):
    """A statement that ends before it is complete: more words would make it one."""


def caret(text: str, position: int, message: str) -> str:
    """A message with the statement below it and a caret under one place.

    >>> print(caret("show los", 5, "unknown field."))
    unknown field.
      show los
           ^
    """
    line = re.sub(r"\s", " ", text)
    return f"{message}\n  {line}\n  {' ' * min(position, len(line))}^"


def _after_blanks(text: str, position: int) -> int:
    """The place behind blanks and comments."""
    blank = _BLANK.match(text, position)
    return blank.end() if blank else position


@dataclass(frozen=True)
class Token:
    """A piece of a statement: kind is "number", "name", "quoted", "symbol" or "end"."""

    kind: str
    text: str
    start: int
    end: int


class Scanner:
    """A place in a statement, and what was looked for there (the source of hints and of completion)."""

    def __init__(self, text: str) -> None:
        """Start at the beginning of a statement."""
        self.text = text
        self._tried: dict[int, dict[str, None]] = {}
        if len(text) > MAX_LENGTH:
            raise QueryError(f"a statement has at most {MAX_LENGTH} characters; this one has {len(text)}.")
        self._move(0)

    def _move(self, position: int) -> None:
        self.position = _after_blanks(self.text, position)
        self._token: Token | None = None

    def peek(self) -> Token:
        """The token at this place."""
        if self._token is None:
            self._token = self._read()
        return self._token

    def _read(self) -> Token:
        if self.position >= len(self.text):
            return Token("end", "", self.position, self.position)
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            raise self.error(self._misfit(self.text[self.position]))
        return Token(match.lastgroup or "", match.group(), match.start(), match.end())

    @staticmethod
    def _misfit(character: str) -> str:
        if character == "`":
            return "a backtick opens a name here and none closes it."
        if character in "[]":
            return "this bracket stands alone; a parameter is written fc1.weight[3,5]."
        return f'"{character}" has no meaning here; a name with such a character is written in backticks.'

    def ahead(self, count: int) -> list[str]:
        """The texts of the next tokens, `count` at most, none taken; they end where something is no token."""
        found: list[str] = []
        position = self.position
        while len(found) < count and (match := _TOKEN.match(self.text, position)):
            found.append(match.group())
            position = _after_blanks(self.text, match.end())
        return found

    def advance(self) -> Token:
        """Take the token at this place."""
        token = self.peek()
        self._move(token.end)
        return token

    def look(self, *wanted: str) -> str | None:
        """Which of some words or symbols stands here, if any; all are remembered as possible here."""
        self.possible(*wanted)
        token = self.peek()
        return token.text if token.kind in ("name", "symbol") and token.text in wanted else None

    def accept(self, *wanted: str) -> str | None:
        """Like `look`, and take the token."""
        found = self.look(*wanted)
        if found is not None:
            self.advance()
        return found

    def require(self, *wanted: str) -> str:
        """Like `accept`; anything else is an error."""
        found = self.accept(*wanted)
        if found is None:
            raise self.unexpected(" or ".join(f'"{word}"' for word in wanted))
        return found

    def possible(self, *words: str) -> None:
        """Remember what could stand at this place."""
        self._tried.setdefault(self.position, {}).update(dict.fromkeys(words))

    def possible_at(self, position: int) -> tuple[str, ...]:
        """What could stand at a place, if the reading came so far."""
        return tuple(self._tried.get(position, ()))

    def scan_selector(self) -> tuple[str, int] | None:
        """The parameter selector that starts here and its end, not taken; blanks outside backticks dropped."""
        match = _SELECTOR.match(self.text, self.position)
        if match is None:
            return None
        return match[1] + re.sub(r"\s", "", match[2] or ""), match.end()

    def jump(self, position: int) -> None:
        """Go on at another place."""
        self._move(position)

    def take_run(self) -> str | None:
        """The run name or path that starts here, taken."""
        match = _RUN.match(self.text, self.position)
        if match is None:
            return None
        self._move(match.end())
        return match[1] or match[2]

    def error(self, message: str, position: int | None = None) -> QueryError:
        """An error with a caret under a place (default: here)."""
        return QueryError(caret(self.text, self.position if position is None else position, message))

    def unexpected(self, needed: str) -> QueryError:
        """The error that something else stands here than is needed, with the nearest word."""
        token = self.peek()
        if token.kind == "end":
            message = f"the statement ends here; {needed} is needed."
            return UnfinishedStatement(caret(self.text, self.position, message))
        words = [word for word in self.possible_at(self.position) if word.isidentifier()]
        guess = nearest(token.text.lower(), words)
        hint = f'; did you mean "{guess}"?' if guess else "."
        return self.error(f'found "{token.text}" where {needed} is needed{hint}')
