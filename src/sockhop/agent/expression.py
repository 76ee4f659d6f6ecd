"""Expressions that choose sockets: the filter language of ss(8), with tests of our own.

state established and ( dport = :443 or dst 10.0.0.0/8 ) and not service = web
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from sockhop.agent.predicates import FLAGS, NAMES, Predicate, Subject, predicate, states
from sockhop.errors import InputError

__all__ = ["Expression", "Subject", "parse_expression"]

_DEEPEST = 100
_TOKEN = re.compile(
    r"\s*(?:(?P<sign>\|\||&&|==|!=|<=|>=|[()!=<>|&])|(?P<quoted>\"[^\"]*\"|'[^']*')"
    r"|(?P<word>[^\s()!=<>|&\"']+))"
)
_ALIASES = {
    **dict.fromkeys(("|", "||", "or"), "or"),
    **dict.fromkeys(("&", "&&", "and"), "and"),
    **dict.fromkeys(("!", "not"), "not"),
}
_COMPARISONS = {
    **dict.fromkeys(("=", "==", "eq"), "="),
    **dict.fromkeys(("!=", "ne", "neq"), "!="),
    **dict.fromkeys((">", "gt"), ">"),
    **dict.fromkeys(("<", "lt"), "<"),
    **dict.fromkeys((">=", "ge", "geq"), ">="),
    **dict.fromkeys(("<=", "le", "leq"), "<="),
}


@dataclass(frozen=True)
class Expression:
    """Which sockets are meant.

    `uses`: the names of its tests, and raw where it names that protocol; subjects need their
    processes for pid.
    """

    text: str
    matches: Predicate
    uses: frozenset[str]


class _Token(NamedTuple):
    text: str
    at: int
    quoted: bool = False

    @property
    def operator(self) -> str:
        """Return or, and, not, for any of their names; else ""."""
        return "" if self.quoted else _ALIASES.get(self.text, "")


def parse_expression(text: str) -> Expression:
    """Return the meaning of *text*; an empty one means every socket.

    Paths and names that it holds are looked up now. InputError names the place of what is wrong.
    """
    parser = _Parser(text)
    matches = parser.filter()
    return Expression(text, matches, frozenset(parser.used))


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._next = 0
        self._depth = 0
        self.used: set[str] = set()

    def filter(self) -> Predicate:
        """A series of states, then an expression; each of them may be missing."""
        mask = self._states()
        token = self._peek()
        if mask is not None and token and token.operator == "or":
            raise self._error(token, "a state holds for all that follows", "put it into brackets")
        joined = mask is not None and self._accept("and")
        rest = self._or() if token or joined else _everything
        if unread := self._peek():
            raise self._error(unread, f"{unread.text!r} does not belong here")
        if mask is None:
            return rest
        return lambda subject: bool(mask >> subject.socket.state & 1) and rest(subject)

    def _states(self) -> int | None:
        mask: int | None = None
        while (word := self._peek()) and word.text in ("state", "exclude", "excl"):
            self._next += 1
            name = self._take("the name of a state")
            try:
                said = states(name.text)
            except ValueError as error:
                raise self._error(name, str(error)) from None
            if word.text == "state":
                mask = said | (mask or 0)
            else:
                mask = (states("all") if mask is None else mask) & ~said
        return mask

    def _or(self) -> Predicate:
        found = [self._and()]
        while self._accept("or"):
            found.append(self._and())
        if len(found) == 1:
            return found[0]
        return lambda subject: any(each(subject) for each in found)

    def _and(self) -> Predicate:
        found = [self._not()]
        while (token := self._peek()) and token.text != ")" and token.operator != "or":
            self._accept("and")
            found.append(self._not())
        if len(found) == 1:
            return found[0]
        return lambda subject: all(each(subject) for each in found)

    def _not(self) -> Predicate:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise InputError(f"filter: more than {_DEEPEST} levels of brackets and negations")
        try:
            if self._accept("not"):
                inner = self._not()
                return lambda subject: not inner(subject)
            if (token := self._peek()) and token.text == "(" and not token.quoted:
                self._next += 1
                inner = self._or()
                closing = self._take("a closing bracket")
                if closing.text != ")":
                    raise self._error(closing, f"{closing.text!r} stands where ) should")
                return inner
            return self._predicate()
        finally:
            self._depth -= 1

    def _predicate(self) -> Predicate:
        name = self._take("a test")
        if name.quoted or name.text not in NAMES:
            raise self._error(name, f"{name.text!r} is no test", f"there are {', '.join(NAMES)}")
        self.used.add(name.text)
        if name.text in FLAGS:
            return predicate(name.text, "=", "")
        comparison, token = "=", self._peek()
        if token and not token.quoted and token.text in _COMPARISONS:
            comparison = _COMPARISONS[token.text]
            self._next += 1
        value = self._take(f"what {name.text} is compared with")
        if not value.quoted and (value.operator or value.text in {"(", ")", *_COMPARISONS}):
            raise self._error(value, f"{value.text!r} stands where a value of {name.text} should")
        if name.text == "protocol" and value.text.lower() == "raw":
            self.used.add("raw")
        try:
            return predicate(name.text, comparison, value.text)
        except ValueError as error:
            raise self._error(value, str(error)) from None

    def _peek(self) -> _Token | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _take(self, what: str) -> _Token:
        token = self._peek()
        if token is None:
            raise InputError(f"filter: it ends where {what} should follow: {self._text}")
        self._next += 1
        return token

    def _accept(self, operator: str) -> bool:
        token = self._peek()
        if token is None or token.operator != operator:
            return False
        self._next += 1
        return True

    def _error(self, token: _Token, message: str, hint: str = "") -> InputError:
        place = f"{self._text}\n  {' ' * token.at}^"
        return InputError(f"filter: {message}", hint=f"{place}\n  {hint}" if hint else place)


def _everything(_: Subject) -> bool:
    return True


def _tokens(text: str) -> list[_Token]:
    found, at, end = [], 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            raise InputError("filter: this quotation mark has no other", hint=text[at:].strip())
        kind = match.lastgroup or ""
        word = match[kind]
        quoted = kind == "quoted"
        found.append(_Token(word[1:-1] if quoted else word, match.start(kind), quoted))
        at = match.end()
    return found
