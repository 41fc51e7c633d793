"""The conditions of steps and tasks: ``when``, in a language simpler than that of expressions, and ``depends``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tally.pipelines.document import scalar_text
from tally.pipelines.expressions import ExpressionError, Tree, calculated, unescaped
from tally.text import did_you_mean

# -- when ----------------------------------------------------------------------------------------------

_WHEN_WORDS = re.compile(
    r"""\s*(?:
    (?P<number>0x[0-9a-fA-F]+|[0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?(?![A-Za-z_]))
    |(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |\[(?P<bracket>[^\]]*)\]
    |(?P<name>[^\W\d][\w.]*)
    |(?P<sign>==|!=|<=|>=|&&|\|\||=~|!~|\*\*|\?\?|[-+*/%<>!?:,()])
    )""",
    re.VERBOSE,
)
_WHEN_POWER = {"||": 1, "&&": 2, "==": 3, "!=": 3, "<": 3, ">": 3, "<=": 3, ">=": 3, "=~": 3, "!~": 3, "in": 3,
               "+": 4, "-": 4, "*": 5, "/": 5, "%": 5, "**": 6}  # fmt: skip
_HINT = '; put what is text in quotes: "..."'


def when(text: str) -> bool:
    """The value of a condition of ``when``, after substitution: bare words are text, as in ``heads == heads``.

    Raises ExpressionError.
    """
    if text.strip() in ("", "true", "false"):
        return text.strip() != "false"
    value = _When(text).whole()
    if not isinstance(value, bool):
        raise ExpressionError(f"when: {text.strip()[:200]!r} is {scalar_text(value)[:60]!r}, neither true nor false")
    return value


class _When:
    """Evaluates while it reads: every value is written in the condition."""

    def __init__(self, text: str) -> None:
        self._text = text.strip()
        self._words: list[tuple[str, Any]] = []
        at = 0
        while at < len(self._text):
            match = _WHEN_WORDS.match(self._text, at)
            if match is None:
                raise self._error(f"{self._text[at:][:20]!r} is not understood{_HINT}")
            kind, value = str(match.lastgroup), match[str(match.lastgroup)]
            if kind == "number":
                self._words.append(("value", float(int(value, 16)) if value.startswith("0x") else float(value)))
            elif kind == "text":
                self._words.append(("value", unescaped(value[1:-1])))
            elif kind == "bracket":
                self._words.append(("value", value))
            elif kind == "name" and value in ("true", "false"):
                self._words.append(("value", value == "true"))
            elif kind == "name" and value != "in":
                self._words.append(("value", value))
            else:
                self._words.append(("sign", value))
            at = match.end()
        self._words.append(("end", None))
        self._next = 0

    def _error(self, what: str) -> ExpressionError:
        return ExpressionError(f"when: {self._text[:200]!r}: {what}")

    def whole(self) -> Any:
        value = self._of(0)
        if self._words[self._next][0] != "end":
            raise self._error(f"{self._words[self._next][1]!r} is not expected there{_HINT}")
        return value

    def _of(self, least: int) -> Any:
        left = self._single()
        while True:
            kind, sign = self._words[self._next]
            if kind != "sign" or _WHEN_POWER.get(sign, -1) < max(least, 1):
                break
            self._next += 1
            right = self._of(_WHEN_POWER[sign] + 1)
            left = self._joined(sign, left, right)
        if least == 0 and self._words[self._next] == ("sign", "?"):
            raise self._error("the choice ? : is not known here")
        return left

    def _single(self) -> Any:
        kind, value = self._words[self._next]
        self._next += 1
        if kind == "value":
            return value
        if value == "!":
            inner = self._single()
            if not isinstance(inner, bool):
                raise self._error(f"! is of true or false, not of {inner!r}")
            return not inner
        if value == "-":
            return -self._number(self._single())
        if value == "(":
            found = [self._of(0)]
            while self._words[self._next] == ("sign", ","):
                self._next += 1
                found.append(self._of(0))
            if self._words[self._next] != ("sign", ")"):
                raise self._error(f"')' is missing{_HINT}")
            self._next += 1
            return found if len(found) > 1 else found[0]
        raise self._error((f"{value!r} is not expected there" if value else "it ends too early") + _HINT)

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, float):
            raise self._error(f"{value!r} is no number{_HINT}")
        return value

    def _joined(self, sign: str, left: Any, right: Any) -> Any:
        if sign in ("&&", "||"):
            if not (isinstance(left, bool) and isinstance(right, bool)):
                raise self._error(f"{sign} is of true and false, not of {left!r} and {right!r}")
            return (left and right) if sign == "&&" else (left or right)
        if sign in ("==", "!="):
            return (type(left) is type(right) and left == right) == (sign == "==")
        if sign == "in":
            return any(
                type(left) is type(each) and left == each for each in (right if isinstance(right, list) else [right])
            )
        if sign in ("=~", "!~"):
            if not (isinstance(left, str) and isinstance(right, str)):
                raise self._error(f"{sign} is of two texts, not of {left!r} and {right!r}{_HINT}")
            try:
                return (re.search(right, left) is not None) == (sign == "=~")
            except re.error as error:
                raise self._error(f"{right!r} is no pattern: {error}") from None
        if not (isinstance(left, str) and isinstance(right, str) and sign in ("<", ">", "<=", ">=", "+")):
            left, right = self._number(left), self._number(right)
        try:
            return calculated(sign, left, right)
        except ExpressionError as error:
            raise self._error(str(error)) from None


# -- depends -------------------------------------------------------------------------------------------

RESULTS = ("Succeeded", "Failed", "Errored", "Skipped", "Omitted", "Daemoned", "AnySucceeded", "AllFailed")
_DEPENDS = re.compile(r"\s*(?:(?P<name>[A-Za-z0-9_-]+(?:\.[A-Za-z]+)?)|(?P<sign>&&|\|\||[!()]))")


def depends(text: str, tolerated: Mapping[str, Sequence[str]] | None = None) -> Tree:
    """The tree of a ``depends``. tolerated: results of tasks, beside success, that a bare name is content with.

    Raises ExpressionError.
    """
    words: list[tuple[str, str]] = []
    at, plain = 0, text.rstrip()
    while at < len(plain):
        match = _DEPENDS.match(plain, at)
        if match is None:
            raise ExpressionError(f"depends: {plain[at:].strip()[:20]!r} is not understood")
        words.append((str(match.lastgroup), match[str(match.lastgroup)]))
        at = match.end()
    words.append(("end", ""))
    position = 0

    def alternatives() -> Tree:
        nonlocal position
        left = together()
        while words[position] == ("sign", "||"):
            position += 1
            left = ("or", left, together())
        return left

    def together() -> Tree:
        nonlocal position
        left = single()
        while words[position] == ("sign", "&&"):
            position += 1
            left = ("and", left, single())
        return left

    def single() -> Tree:
        nonlocal position
        kind, value = words[position]
        position += 1
        if (kind, value) == ("sign", "!"):
            return ("not", single())
        if (kind, value) == ("sign", "("):
            inner = alternatives()
            if words[position] != ("sign", ")"):
                raise ExpressionError(f"depends: {text!r}: ')' is missing")
            position += 1
            return inner
        if kind != "name":
            raise ExpressionError(
                f"depends: {text!r}: a task is expected" + (f" before {value!r}" if value else " at the end")
            )
        task, dot, result = value.partition(".")
        if not dot:
            results = ("Succeeded", "Skipped", "Daemoned", *(tolerated or {}).get(task, ()))
            return ("task", task, results)
        if result not in RESULTS:
            raise ExpressionError(f"depends: {value!r}: there is no result {result!r}" + did_you_mean(result, RESULTS))
        return ("task", task, (result,))

    tree = alternatives()
    if words[position][0] != "end":
        raise ExpressionError(f"depends: {text!r}: {words[position][1]!r} is not expected there")
    return tree


def dependencies(task: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> tuple[Tree | None, set[str]]:
    """What a task waits for: the tree of its ``depends``, and the tasks in it. Raises ExpressionError."""
    text = task.get("depends", "")
    tolerated: dict[str, list[str]] = {}
    if not text and task.get("dependencies"):
        text = " && ".join(task["dependencies"])
        for each in task["dependencies"]:
            goes_on = (tasks.get(each) or {}).get("continueOn") or {}
            tolerated[each] = [
                result for key, result in (("failed", "Failed"), ("error", "Errored")) if goes_on.get(key)
            ]
    if not text:
        return None, set()
    tree = depends(text, tolerated)
    return tree, tasks_of(tree)


def tasks_of(tree: Tree) -> set[str]:
    """The tasks that a ``depends`` names."""
    if tree[0] == "task":
        return {tree[1]}
    return set().union(*(tasks_of(each) for each in tree[1:]))


def is_met(tree: Tree, results: Mapping[str, Sequence[str]]) -> bool:
    """Whether a ``depends`` is fulfilled. results: those that each task has."""
    match tree[0]:
        case "task":
            return any(each in results[tree[1]] for each in tree[2])
        case "not":
            return not is_met(tree[1], results)
        case "and":
            return is_met(tree[1], results) and is_met(tree[2], results)
    return is_met(tree[1], results) or is_met(tree[2], results)
