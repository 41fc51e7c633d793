"""Secrets in texts: what is printed, stored or logged shows ``***`` in their place."""

from __future__ import annotations

import re
from urllib.parse import unquote

HIDDEN = "***"

_NAME = (
    r"(?:pass(?:word|wd|phrase)|pwd|secret|token|(?:api|access|account|private|shared|sas)[_-]?key"
    r"|signature|credential)"
)
_URL = re.compile(r"(?i)(?<![a-z0-9+.-])([a-z][a-z0-9+.-]*)(://|:%2f%2f|%3a%2f%2f)([^\s'\"<>|`]*)")
_PORT = re.compile(r"[^:@]*(?::\d*)?(?:,[^:@,]*:\d+)*[:.,;)\]}]*|\[[^\]]*\](?::\d*)?[:.,;)\]}]*")
_PAIR = re.compile(rf"(?i)([\w.-]*{_NAME}[\w.-]*|\bsig)(\s*=\s*)('(?:[^'\\]|\\.)*'|\"[^\"]*\"|[^\s&;,'\"]+)")
_JSON = re.compile(rf"(?i)((?:\"[\w.-]*{_NAME}[\w.-]*\"|'[\w.-]*{_NAME}[\w.-]*')\s*:\s*)(\"[^\"]*\"|'[^']*')")
_HEADER = re.compile(
    r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie|(?:x-)?api-key|x-[\w-]*(?:token|key|signature|secret)[\w-]*)"
    r"(['\"]?\s*[:=](?!\s*\*\*\*)\s*)('[^']*'|\"[^\"]*\"|[^'\"\r\n]+)"
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}")
_SIGNING = re.compile(r"whsec_[A-Za-z0-9+/=]{8,}")
_SUSPECT = re.compile(r"(?i)pass|pwd|secret|token|key|signature|credential|sig\s*=|cookie|authorization|bearer|whsec_")
"""What a text has that needs a closer look: most have nothing of it."""
_SERVICES = (
    *("postgres", "mysql", "mariadb", "sqlite", "duckdb", "mongodb"),
    *("amqp", "redis", "sqs", "azure-queue", "servicebus", "kafka"),
)
"""How schemes begin whose URLs name a user, and options in their query, which are no secrets."""
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes of URLs that name their container before an ``@``."""


def mask(text: str) -> str:
    """The text without secrets: passwords and tokens before a URL's host, also where the URL is malformed, values of
    its query and fragment, passwords among settings (``password=...``), and headers that authorise."""
    if "://" in text or "%2" in text:
        text = _URL.sub(_masked_url, _joined(text))
    if _SUSPECT.search(text):
        text = _PAIR.sub(rf"\1\2{HIDDEN}", text)
        text = _JSON.sub(rf'\1"{HIDDEN}"', text)
        text = _HEADER.sub(rf"\1\2{HIDDEN}", text)
        text = _SIGNING.sub(HIDDEN, _BEARER.sub(rf"\1{HIDDEN}", text))
    return text


def has_secret(url: str) -> bool:
    """Whether something in the URL has to be masked."""
    return mask(url) != url


def _joined(text: str) -> str:
    """A text that is one URL with spaces or quotes in its password, without what is before its host."""
    scheme, separator, rest = text.partition("://")
    first = re.split(r"[\s'\"<>|`]", rest, maxsplit=1)[0]
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) or first == rest:
        return text
    authority = re.split(r"[/?#]", first, maxsplit=1)[0]
    if "@" in first or "@" not in rest or _PORT.fullmatch(authority):
        return text
    return f"{scheme}://{_user(authority)}{HIDDEN}@{rest.rpartition('@')[2]}"


def _masked_url(found: re.Match[str]) -> str:
    scheme, separator, rest = found.groups()
    authority = re.split(r"(?i)[/?#]|%2f", rest, maxsplit=1)[0]
    ends = [each.end() for each in re.finditer(r"@|%40", rest)]
    inside = bool(re.search(r"@|%40", authority))
    shown = ""
    if scheme.lower() in _CONTAINERS and ":" not in authority:
        pass
    elif ends and (inside or ":" in authority):
        whole = rest[: ends[-1]]
        shown = whole if _is_user_only(scheme, whole) else f"{_user(authority)}{HIDDEN}@"
        rest = rest[ends[-1] :]
    elif not _PORT.fullmatch(authority):
        shown, rest = f"{_user(authority)}{HIDDEN}", rest[len(authority) :]
    return scheme + separator + shown + _without_values(scheme, rest)


def _is_user_only(scheme: str, before: str) -> bool:
    """Whether ``name@`` is a user of a database or a broker. Before a web address, a name alone is a token."""
    return scheme.lower().startswith(_SERVICES) and re.fullmatch(r"[^:/@%]+@", before) is not None


def _user(authority: str) -> str:
    """``name:`` where a name is given before a password."""
    name, separator, _ = authority.partition(":")
    return f"{name}:" if separator and "@" not in name and "%" not in name else ""


def _without_values(scheme: str, rest: str) -> str:
    """What follows the host, without the values of its query and its fragment."""
    path, hash_, fragment = rest.partition("#")
    if fragment and not re.match(r"sha256=[0-9A-Fa-f]*", fragment):
        fragment = re.sub(r"([\w%.-]+=)[^&]*", rf"\1{HIDDEN}", fragment)
    place, mark, query = path.partition("?")
    if query and scheme.lower().startswith(_SERVICES):
        parts = [each.partition("=") for each in query.split("&")]
        query = "&".join(
            name + is_ + (HIDDEN if re.search(f"(?i){_NAME}", unquote(name)) else value) for name, is_, value in parts
        )
    elif "=" in query:
        query = re.sub(r"([^&;=]*=)[^&;]*", rf"\1{HIDDEN}", query)
    elif query and scheme.lower() in ("http", "https"):
        query = HIDDEN
    return place + mark + query + hash_ + fragment
