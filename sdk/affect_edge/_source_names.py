"""What a source is called where people read it: without its passwords."""

import re

__all__ = ["masked", "url_scheme"]

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?P<rest>[^\s\"]*)")
_QUOTED = re.compile(r"\"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?P<rest>[^\"]*)\"")
_WHOLE = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?P<rest>.*)", re.DOTALL)
# Words that some cameras want their password after, in the path or the query; and GStreamer in a pipeline.
_SECRET = re.compile(r"(?i)([\w-]*(?:pass|pwd|pw|token|secret|key|auth|credential)[\w-]*=)(\"[^\"]*\"|[^\s&;/!]+)")
# What tells two streams of one camera apart, and no more than that.
_HARMLESS = frozenset("cam camera channel fps height profile quality resolution stream subtype transport width".split())


def url_scheme(text: str) -> str | None:
    """The scheme of a URL, in lower case; None for what is none (a drive letter is not)."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", text)
    return found.group(1).lower() if found else None


def masked(text: str) -> str:
    """The text with *** for every password, token and query value in its URLs.

    It rather hides too much: whatever stands before the last "@" may be part of a password with a "/" in it.
    """
    whole = None if " ! " in text else _WHOLE.fullmatch(text)  # a password may have a space in it
    if whole is None:
        hidden = _QUOTED.sub(lambda found: f'"{found["scheme"]}://{_rest(found["rest"])}"', text)
        hidden = _URL.sub(lambda found: f"{found['scheme']}://{_rest(found['rest'])}", hidden)
    else:
        hidden = f"{whole['scheme']}://{_rest(whole['rest'])}"
    return _SECRET.sub(r"\1***", hidden)


def _rest(rest: str) -> str:
    place, mark, query = rest.partition("?")
    if "@" in query:  # a "?" inside a password, or a query: no telling
        place, mark, query = rest, "", ""
    user, at, host = place.rpartition("@")
    if user:
        name, colon, _ = user.partition(":")
        place = f"{name}:***@{host}" if colon else f"***@{host}"
    else:
        place = at + host
    place = place.partition("#")[0]
    return place + mark + "&".join(_value(part) for part in query.split("&")) if mark else place


def _value(part: str) -> str:
    name, equals, _ = part.partition("=")
    return part if name.lower() in _HARMLESS else f"{name}=***" if equals else "***"
