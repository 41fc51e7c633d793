"""Expressions as Argo evaluates them: the language of expr-lang.org in ``{{=...}}``, ``valueFrom.expression`` and
``retryStrategy.expression``.

No library of Python evaluates them. This is the part of the language that workflows use; what it does not know is
refused when the expression is parsed, by name, and never guessed. Values are those of JSON.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from tally.pipelines.document import Spelled, loaded, scalar_text, to_json
from tally.text import did_you_mean

Scope: TypeAlias = Mapping[str, Any]
"""Nested mappings: ``inputs`` → ``parameters`` → a name → its text."""


class ExpressionError(ValueError):
    """An expression that cannot be read, or has no value here."""


# -- words ---------------------------------------------------------------------------------------------

_WORDS = re.compile(
    r"""\s*(?:
    (?P<number>0x[0-9a-fA-F]+|[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?)
    |(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`)
    |(?P<name>[A-Za-z_$][A-Za-z0-9_$]*)
    |(?P<sign>\?\.|\?\?|\*\*|\.\.|==|!=|<=|>=|&&|\|\||=~|!~|[-+*/%^<>!?:.,;()\[\]{}\#|=])
    )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


@dataclass(frozen=True, slots=True)
class _Word:
    kind: Literal["number", "text", "name", "sign", "end"]
    value: Any
    at: int


def _words(text: str) -> list[_Word]:
    found, at = [], 0
    while text[at:].strip():
        match = _WORDS.match(text, at)
        if match is None:
            rest = text[at:].strip()
            raise ExpressionError(f"{rest[:20]!r} is not understood")
        kind: Any = match.lastgroup
        value: Any = match[kind]
        if kind == "number":
            plain = value.replace("_", "")
            value = (
                int(plain, 0)
                if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", plain) and not plain.startswith("00")
                else float(plain)
            )
        elif kind == "text":
            value = value[1:-1] if value[0] == "`" else unescaped(value[1:-1])
        found.append(_Word(kind, value, match.start(kind)))
        at = match.end()
    return [*found, _Word("end", None, len(text))]


def unescaped(text: str) -> str:
    def replaced(match: re.Match[str]) -> str:
        escape = match[1]
        if escape[0] in "ux":
            return chr(int(escape[1:], 16))
        return _ESCAPES.get(escape, escape)

    return re.sub(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", replaced, text, flags=re.DOTALL)


# -- trees ---------------------------------------------------------------------------------------------

Tree: TypeAlias = tuple[Any, ...]
"""The kind of an expression, and its parts."""

_BINARY: dict[str, tuple[int, bool]] = {
    "|": (0, False), "||": (10, False), "or": (10, False), "&&": (15, False), "and": (15, False), "==": (20, False),
    "!=": (20, False), "<": (20, False), ">": (20, False), ">=": (20, False), "<=": (20, False), "in": (20, False),
    "matches": (20, False), "contains": (20, False), "startsWith": (20, False), "endsWith": (20, False),
    "..": (25, False), "+": (30, False), "-": (30, False), "*": (60, False), "/": (60, False), "%": (60, False),
    "**": (100, True), "^": (100, True), "??": (500, False),
}  # fmt: skip
_UNARY = {"not": 50, "!": 50, "-": 90, "+": 90}
_WITH_BODY = ("map", "filter", "all", "any", "one", "none", "count", "find", "findIndex")


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._words, self._next = text, _words(text), 0

    def whole(self) -> Tree:
        tree = self.expression(0)
        if self._peek.kind != "end":
            raise ExpressionError(f"{self._text[self._peek.at :][:20]!r} is not expected there")
        return tree

    @property
    def _peek(self) -> _Word:
        return self._words[self._next]

    def _take(self) -> _Word:
        word = self._words[self._next]
        self._next += 1
        return word

    def _is(self, sign: str) -> bool:
        return self._peek.kind in ("sign", "name") and self._peek.value == sign

    def _accept(self, sign: str) -> bool:
        if self._is(sign):
            self._next += 1
            return True
        return False

    def _expect(self, sign: str) -> None:
        if not self._accept(sign):
            found = self._text[self._peek.at :][:20]
            raise ExpressionError(f"{sign!r} is expected" + (f" before {found!r}" if found else " at the end"))

    def expression(self, least: int) -> Tree:
        left = self._unary()
        while True:
            word = self._peek
            sign = word.value if word.kind in ("sign", "name") else None
            negated = sign == "not" and self._words[self._next + 1].value in (
                "in",
                "matches",
                "contains",
                "startsWith",
                "endsWith",
            )
            if negated:
                sign = self._words[self._next + 1].value
            if sign not in _BINARY or _BINARY[sign][0] < least:
                break
            self._next += 2 if negated else 1
            power, right_first = _BINARY[sign]
            if sign == "|":
                left = self._piped(left)
                continue
            right = self.expression(power if right_first else power + 1)
            left = ("binary", sign, left, right)
            if negated:
                left = ("unary", "!", left)
        if least == 0 and self._accept("?"):
            if self._accept(":"):
                return ("choice", left, left, self.expression(0))
            yes = self.expression(0)
            self._expect(":")
            return ("choice", left, yes, self.expression(0))
        return left

    def _piped(self, left: Tree) -> Tree:
        name = self._take()
        if name.kind != "name":
            raise ExpressionError("a function is expected after |")
        self._expect("(")
        return self._call(("name", name.value), [left])

    def _unary(self) -> Tree:
        word = self._peek
        if word.kind in ("sign", "name") and word.value in _UNARY:
            self._next += 1
            return ("unary", "!" if word.value == "not" else word.value, self.expression(_UNARY[word.value]))
        return self._postfix(self._primary())

    def _primary(self) -> Tree:
        word = self._take()
        if word.kind in ("number", "text"):
            return ("value", word.value)
        if word.kind == "name":
            if word.value in ("true", "false"):
                return ("value", word.value == "true")
            if word.value in ("nil", "null"):
                return ("value", None)
            if word.value == "let":
                raise ExpressionError("let is not known here")
            return ("name", word.value)
        if word.value == "#":
            if self._peek.kind == "name" and self._peek.value in ("index", "acc"):
                raise ExpressionError(f"#{self._peek.value} is not known here")
            return ("item",)
        if word.value == ".":  # inside of a body: a member of the item
            name = self._take()
            if name.kind != "name":
                raise ExpressionError("a name is expected after the dot")
            return ("member", ("item",), ("value", name.value), False)
        if word.value == "(":
            inner = self.expression(0)
            self._expect(")")
            return inner
        if word.value == "[":
            return ("list", self._until("]"))
        if word.value == "{":
            return self._map()
        found = self._text[word.at :][:20]
        raise ExpressionError(f"{found!r} is not expected there" if found else "it ends too early")

    def _until(self, end: str) -> list[Tree]:
        found: list[Tree] = []
        while not self._accept(end):
            found.append(self.expression(0))
            if not self._accept(","):
                self._expect(end)
                break
        return found

    def _map(self) -> Tree:
        entries: list[tuple[Tree, Tree]] = []
        while not self._accept("}"):
            word = self._take()
            key: Tree
            if word.kind in ("name", "text", "number"):
                key = ("value", str(word.value))
            elif word.value == "(":
                key = self.expression(0)
                self._expect(")")
            else:
                raise ExpressionError("a key is expected in { }")
            self._expect(":")
            entries.append((key, self.expression(0)))
            if not self._accept(","):
                self._expect("}")
                break
        return ("map", entries)

    def _postfix(self, tree: Tree) -> Tree:
        while True:
            if self._accept("(" if tree[0] in ("name", "member") else "\0"):
                tree = self._call(tree, [])
            elif self._is(".") or self._is("?."):
                optional = self._take().value == "?."
                name = self._take()
                if name.kind != "name":
                    raise ExpressionError("a name is expected after the dot")
                tree = ("member", tree, ("value", name.value), optional)
            elif self._accept("["):
                tree = self._index(tree)
            else:
                return tree

    def _index(self, tree: Tree) -> Tree:
        start: Tree | None = None if self._is(":") else self.expression(0)
        if self._accept(":"):
            stop = None if self._is("]") else self.expression(0)
            self._expect("]")
            return ("slice", tree, start, stop)
        self._expect("]")
        return ("member", tree, start, False)

    def _call(self, function: Tree, given: list[Tree]) -> Tree:
        name = _function_name(function)
        if name in _WITH_BODY:
            if not given:
                given = [self.expression(0)]
                self._expect(",")
            if self._accept("{"):
                body = self.expression(0)
                self._expect("}")
            else:
                body = self.expression(0)
            self._accept(",")
            self._expect(")")
            return ("each", name, given[0], body)
        if name not in FUNCTIONS:
            raise ExpressionError(
                f"the function {name}() is not known here" + did_you_mean(name, (*FUNCTIONS, *_WITH_BODY))
            )
        return ("call", name, [*given, *self._until(")")])


def _function_name(tree: Tree) -> str:
    if tree[0] == "name":
        return str(tree[1])
    inner, key = tree[1], tree[2]
    if inner == ("name", "sprig") and key[0] == "value":
        return f"sprig.{key[1]}"
    raise ExpressionError("only functions by their name can be called")


@lru_cache(maxsize=4096)
def parse(text: str) -> Tree:
    """The tree of an expression. Raises ExpressionError for what is wrong in it, and for what is not known here."""
    try:
        return _Parser(text).whole()
    except RecursionError:
        raise ExpressionError("it is nested too deeply") from None


def references(tree: Any) -> list[tuple[str, ...]]:
    """The names that an expression refers to: ``("inputs", "parameters", "a")``, as far as they are written out."""
    found: list[tuple[str, ...]] = []

    def path(node: Any) -> tuple[str, ...] | None:
        if node[0] == "name":
            return (node[1],)
        if node[0] == "member" and node[2] and node[2][0] == "value" and isinstance(node[2][1], str):
            before = path(node[1])
            return None if before is None else (*before, node[2][1])
        return None

    def walk(node: Any) -> None:
        if isinstance(node, tuple) and node and isinstance(node[0], str):
            whole = path(node) if node[0] in ("name", "member") else None
            if whole is not None:
                found.append(whole)
                return
            for each in node[1:]:
                walk(each)
        elif isinstance(node, (list, tuple)):
            for each in node:
                walk(each)

    walk(tree)
    return found


# -- values --------------------------------------------------------------------------------------------


def evaluate(text: str, scope: Scope) -> Any:
    """The value of an expression. Raises ExpressionError."""
    try:
        return _Evaluation(scope).of(parse(text), None)
    except RecursionError:
        raise ExpressionError("it is nested too deeply") from None
    except (TypeError, ValueError, OverflowError, ZeroDivisionError, LookupError) as error:
        if isinstance(error, ExpressionError):
            raise
        raise ExpressionError(str(error) or type(error).__name__) from None


def truth(text: str, scope: Scope) -> bool:
    """The value of an expression that is true or false. Raises ExpressionError."""
    value = evaluate(text, scope)
    if not isinstance(value, bool):
        raise ExpressionError(f"it is {scalar_text(value)[:100]!r}, neither true nor false")
    return value


class _Evaluation:
    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def of(self, tree: Tree, item: Any) -> Any:
        return getattr(self, f"_{tree[0]}")(tree, item)

    def _value(self, tree: Tree, item: Any) -> Any:
        return tree[1]

    def _item(self, tree: Tree, item: Any) -> Any:
        if item is None:
            raise ExpressionError("# stands outside of map, filter and the like")
        return item[0]

    def _name(self, tree: Tree, item: Any) -> Any:
        if tree[1] not in self._scope:
            raise ExpressionError(f"there is no {tree[1]!r} here" + did_you_mean(tree[1], self._scope))
        return self._scope[tree[1]]

    def _list(self, tree: Tree, item: Any) -> Any:
        return [self.of(each, item) for each in tree[1]]

    def _map(self, tree: Tree, item: Any) -> Any:
        return {str(self.of(key, item)): self.of(value, item) for key, value in tree[1]}

    def _choice(self, tree: Tree, item: Any) -> Any:
        return self.of(tree[2] if self._truth(tree[1], item) else tree[3], item)

    def _truth(self, tree: Tree, item: Any) -> bool:
        value = self.of(tree, item)
        if not isinstance(value, bool):
            raise ExpressionError(f"{scalar_text(value)[:60]!r} is neither true nor false")
        return value

    def _member(self, tree: Tree, item: Any) -> Any:
        _, inner, key_tree, optional = tree
        container, key = self.of(inner, item), self.of(key_tree, item)
        if container is None:
            if optional:
                return None
            raise ExpressionError(f"there is no {_shown(inner)}, so no {key!r} of it")
        if isinstance(container, Mapping):
            if key in container:
                return container[key]
            if inner[0] in ("name", "member") and _is_of_scope(inner):
                if optional:
                    return None
                raise ExpressionError(
                    f"there is no {key!r} in {_shown(inner)}" + did_you_mean(str(key), map(str, container))
                )
            return None
        if isinstance(container, (list, str)):
            number = _integer(key)
            if not -len(container) <= number < len(container):
                raise ExpressionError(f"there is no number {number} among {len(container)}")
            return container[number]
        raise ExpressionError(f"{_shown(inner)} is {scalar_text(container)[:60]!r}, which has no parts")

    def _slice(self, tree: Tree, item: Any) -> Any:
        container = self.of(tree[1], item)
        start = 0 if tree[2] is None else _integer(self.of(tree[2], item))
        stop = None if tree[3] is None else _integer(self.of(tree[3], item))
        if not isinstance(container, (list, str)):
            raise ExpressionError("only lists and text can be cut")
        return container[start:stop]

    def _unary(self, tree: Tree, item: Any) -> Any:
        if tree[1] == "!":
            return not self._truth(tree[2], item)
        value = _numeric(self.of(tree[2], item))
        return -value if tree[1] == "-" else value

    def _binary(self, tree: Tree, item: Any) -> Any:
        _, sign, left_tree, right_tree = tree
        if sign in ("&&", "and"):
            return self._truth(left_tree, item) and self._truth(right_tree, item)
        if sign in ("||", "or"):
            return self._truth(left_tree, item) or self._truth(right_tree, item)
        if sign == "??":
            try:
                left = self.of(left_tree, item)
            except ExpressionError:
                left = None
            return self.of(right_tree, item) if left is None else left
        return _binary(sign, self.of(left_tree, item), self.of(right_tree, item))

    def _each(self, tree: Tree, item: Any) -> Any:
        _, name, list_tree, body = tree
        values = self.of(list_tree, item)
        if isinstance(values, Mapping):
            values = list(values.values())
        if not isinstance(values, list):
            raise ExpressionError(f"{name}() is of a list")
        if name == "map":
            return [self.of(body, (each,)) for each in values]
        kept = [(number, each) for number, each in enumerate(values) if self._truth(body, (each,))]
        match name:
            case "filter":
                return [each for _, each in kept]
            case "find":
                return kept[0][1] if kept else None
            case "findIndex":
                return kept[0][0] if kept else -1
            case "count":
                return len(kept)
        return {"all": len(kept) == len(values), "any": bool(kept), "one": len(kept) == 1, "none": not kept}[name]

    def _call(self, tree: Tree, item: Any) -> Any:
        given = [self.of(each, item) for each in tree[2]]
        try:
            return FUNCTIONS[tree[1]](*given)
        except TypeError as error:
            raise ExpressionError(
                f"{tree[1]}({', '.join(scalar_text(each)[:40] for each in given)}): {error}"
            ) from None


def _is_of_scope(tree: Tree) -> bool:
    """Whether it is a part of what is known by name, where a missing part is a mistake."""
    return tree[0] == "name" or (tree[0] == "member" and _is_of_scope(tree[1]))


def _shown(tree: Tree) -> str:
    if tree[0] == "name":
        return str(tree[1])
    if tree[0] == "member" and tree[2][0] == "value":
        return f"{_shown(tree[1])}.{tree[2][1]}"
    return "that"


def _numeric(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ExpressionError(f"{scalar_text(value)[:60]!r} is no number; asInt() and asFloat() make one")
    return value


def _integer(value: Any) -> int:
    number = _numeric(value)
    if number != int(number):
        raise ExpressionError(f"{number} is no whole number")
    return int(number)


def _binary(sign: str, left: Any, right: Any) -> Any:
    match sign:
        case "==":
            return _same(left, right)
        case "!=":
            return not _same(left, right)
        case "in":
            return left in right if isinstance(right, Mapping) else any(_same(left, each) for each in _listed(right))
        case "matches":
            return re.search(_text(right), _text(left)) is not None
        case "contains":
            return _text(right) in _text(left)
        case "startsWith":
            return _text(left).startswith(_text(right))
        case "endsWith":
            return _text(left).endswith(_text(right))
        case "..":
            return list(range(_integer(left), _integer(right) + 1))
        case "%":
            return int(calculated("%", _integer(left), _integer(right)))
        case "^":
            return calculated("**", left, right)
    return calculated(sign, left, right)


def calculated(sign: str, left: Any, right: Any) -> Any:
    """What comes of two numbers, or of two texts where these are compared or added. Raises ExpressionError."""
    of_texts = isinstance(left, str) and isinstance(right, str)
    if not of_texts:
        left, right = _numeric(left), _numeric(right)
    match sign:
        case "<":
            return left < right
        case ">":
            return left > right
        case "<=":
            return left <= right
        case ">=":
            return left >= right
        case "+":
            return left + right
    left, right = _numeric(left), _numeric(right)
    match sign:
        case "-":
            return left - right
        case "*":
            return left * right
        case "**":
            return float(left) ** float(right)
    if right == 0:
        raise ExpressionError(f"{scalar_text(left)} {sign} 0")
    return left / right if sign == "/" else math.fmod(left, right)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ExpressionError(f"{scalar_text(value)[:60]!r} is no list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ExpressionError(f"{scalar_text(value)[:60]!r} is no text")
    return value


# -- functions -----------------------------------------------------------------------------------------


_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
"""As Go reads them: no spaces, and no underscores, both of which Python takes."""


def _as_int(value: Any) -> int:
    if isinstance(value, str):
        if not _INTEGER.fullmatch(value):
            raise ExpressionError(f"asInt({value[:60]!r}): that is no whole number")
        return int(value)
    return int(_numeric(value))


def _as_float(value: Any) -> float:
    if isinstance(value, str):
        if not _FLOAT.fullmatch(value) or not math.isfinite(found := float(value)):
            raise ExpressionError(f"asFloat({value[:60]!r}): that is no number")
        return found
    return float(_numeric(value))


def _loaded(value: Any) -> Any:
    try:
        return _unspelled(loaded(_text(value)))
    except ValueError as error:
        raise ExpressionError(f"{_text(value)[:60]!r} is not JSON: {error}") from None


def _unspelled(value: Any) -> Any:
    """A value of JSON whose numbers are numbers, however they were written."""
    if isinstance(value, Spelled):
        return float(value)
    if isinstance(value, dict):
        return {key: _unspelled(each) for key, each in value.items()}
    return [_unspelled(each) for each in value] if isinstance(value, list) else value


_STEPS = re.compile(r"\.([A-Za-z0-9_-]+|\*)|\[(\d+|\*|'[^']*'|\"[^\"]*\")\]")


def jsonpath(value: Any, path: str) -> Any:
    """What a path such as ``$.a.b[0]`` finds in a JSON text or value. Raises ExpressionError."""
    found = _loaded(value) if isinstance(value, str) else value
    rest = _text(path).strip()
    if not rest.startswith("$"):
        raise ExpressionError(f"the path {path!r} has to begin with $")
    return _followed(found, rest[1:], path)


def _followed(found: Any, rest: str, path: str) -> Any:
    while rest:
        match = _STEPS.match(rest)
        if match is None:
            raise ExpressionError(f"{rest[:20]!r} of the path {path!r} is not understood here")
        rest = rest[match.end() :]
        key = match[1] if match[1] is not None else match[2]
        if key == "*":
            values = list(found.values()) if isinstance(found, dict) else _listed(found)
            return [_followed(each, rest, path) for each in values]
        if isinstance(found, list) and key.isdigit():
            if int(key) >= len(found):
                raise ExpressionError(f"{path!r} finds nothing: there is no number {key} among {len(found)}")
            found = found[int(key)]
            continue
        key = key[1:-1] if key[:1] in "'\"" and match[2] else key
        if not isinstance(found, dict) or key not in found:
            raise ExpressionError(f"{path!r} finds nothing: there is no {key!r}")
        found = found[key]
    return found


def _int_or_zero(value: Any) -> int:
    """As Sprig's ``int``: 0 for what is no number."""
    try:
        return int(float(value)) if not isinstance(value, bool) else int(value)
    except (TypeError, ValueError):
        return 0


def _decoded(value: Any) -> str:
    try:
        return base64.b64decode(_text(value), validate=True).decode("utf-8", "replace")
    except binascii.Error as error:
        raise ExpressionError(f"b64dec({_text(value)[:40]!r}): {error}") from None


def _numbers(*values: Any) -> list[int]:
    return [_int_or_zero(each) for each in values]


def _quotient(left: Any, right: Any) -> int:
    divisor = _int_or_zero(right)
    if divisor == 0:
        raise ExpressionError("sprig.div by 0")
    return int(_int_or_zero(left) / divisor)


def _length(value: Any) -> int:
    if not isinstance(value, (str, list, Mapping)):
        raise ExpressionError("len() is of text, a list or a mapping")
    return len(value)


def _product(values: Sequence[int]) -> int:
    return math.prod(values)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "asInt": _as_int,
    "asFloat": _as_float,
    "int": _as_int,
    "float": _as_float,
    "string": scalar_text,
    "jsonpath": jsonpath,
    "toJson": to_json,
    "toJSON": to_json,
    "fromJSON": _loaded,
    "len": _length,
    "abs": lambda value: abs(_numeric(value)),
    "ceil": lambda value: float(math.ceil(_numeric(value))),
    "floor": lambda value: float(math.floor(_numeric(value))),
    "max": lambda *values: max(_numeric(each) for each in (values[0] if isinstance(values[0], list) else values)),
    "min": lambda *values: min(_numeric(each) for each in (values[0] if isinstance(values[0], list) else values)),
    "sum": lambda values: sum(_numeric(each) for each in _listed(values)),
    "trim": lambda text: _text(text).strip(),
    "upper": lambda text: _text(text).upper(),
    "lower": lambda text: _text(text).lower(),
    "split": lambda text, by: _text(text).split(_text(by)),
    "replace": lambda text, old, new: _text(text).replace(_text(old), _text(new)),
    "join": lambda values, by="": _text(by).join(map(_text, _listed(values))),
    "first": lambda values: _listed(values)[0] if values else None,
    "last": lambda values: _listed(values)[-1] if values else None,
    "keys": lambda value: sorted(value),
    "values": lambda value: [value[key] for key in sorted(value)],
    "sprig.trim": lambda text: _text(text).strip(),
    "sprig.upper": lambda text: _text(text).upper(),
    "sprig.lower": lambda text: _text(text).lower(),
    "sprig.title": lambda text: _text(text).title(),
    "sprig.replace": lambda old, new, text: _text(text).replace(_text(old), _text(new)),
    "sprig.trimSuffix": lambda end, text: _text(text).removesuffix(_text(end)),
    "sprig.trimPrefix": lambda start, text: _text(text).removeprefix(_text(start)),
    "sprig.contains": lambda part, text: _text(part) in _text(text),
    "sprig.hasPrefix": lambda start, text: _text(text).startswith(_text(start)),
    "sprig.hasSuffix": lambda end, text: _text(text).endswith(_text(end)),
    "sprig.splitList": lambda by, text: _text(text).split(_text(by)),
    "sprig.join": lambda by, values: _text(by).join(scalar_text(each) for each in _listed(values)),
    "sprig.repeat": lambda count, text: _text(text) * _integer(count),
    "sprig.b64enc": lambda text: base64.b64encode(_text(text).encode()).decode(),
    "sprig.b64dec": _decoded,
    "sprig.int": _int_or_zero,
    "sprig.int64": _int_or_zero,
    "sprig.atoi": _int_or_zero,
    "sprig.toString": scalar_text,
    "sprig.toJson": to_json,
    "sprig.fromJson": _loaded,
    "sprig.add": lambda *values: sum(_numbers(*values)),
    "sprig.sub": lambda left, right: _int_or_zero(left) - _int_or_zero(right),
    "sprig.mul": lambda *values: _product(_numbers(*values)),
    "sprig.div": _quotient,
    "sprig.max": lambda *values: max(_numbers(*values)),
    "sprig.min": lambda *values: min(_numbers(*values)),
    "sprig.default": lambda other, value=None: value if value not in (None, "", 0, False, [], {}) else other,
    "sprig.ternary": lambda yes, no, condition: yes if condition else no,
}
"""By name. Those with a body (map, filter and the like) are part of the language."""
