"""Where a store is: what its URL may be, and how it is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote, quote_plus, unquote

from orchestrator.errors import StoreError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.*)")
_STRANGE = re.compile(r"[\x00-\x1f\x7f]|^\s|\s$")
_FOLDERS = ("file", "local")
_CACHES = ("simplecache", "filecache", "blockcache", "cached")
_BUCKETS = ("s3", "s3a", "gs", "gcs")

# A secret key may hold slashes and '@'. abfs://CONTAINER@ACCOUNT/ is no secret.
_USER = r"(?<!abfs)(?<!abfss)(?<!wasb)(?<!wasbs)://[^\s/@\"',]*@"
_CREDENTIALS = re.compile(rf"://[^\s@/\"',]*:[^\s\"',]*@|://[^\s@/:\"',]*:[^\s@/\"',]*%40|{_USER}", re.IGNORECASE)
# Where the whole text is one URL, quotes and commas belong to it, too.
_ONE_URL = re.compile(r"[A-Za-z0-9+.:-]+://\S+")
_CREDENTIALS_OF_ONE = re.compile(r"://[^\s@/]*:\S*@")
_SECRET = r"key|secret|token|sig|signature|passw(?:or)?d|passphrase|credential|sas"
_SECRET_NAME = re.compile(rf"{_SECRET}|_pwd|_pass$|_dsn$", re.IGNORECASE)
# As it stands in a URL, or quoted in the path of another one.
_SECRET_ARGUMENT = re.compile(
    rf"([?&;#][^=&#\s%]*?(?:{_SECRET}|pwd)[^=&#\s%]*=)[^&;#\s\"'<>]+"
    rf"|((?:%3F|%26|%3B|%23)[^=&#\s%]*?(?:{_SECRET}|pwd)[^=&#\s%]*%3D)(?:(?!%26|%23)[^&;#\s\"'<>])+",
    re.IGNORECASE,
)
_PASSWORD = re.compile(r"://[^\s@/:]*:(\S{4,})@")
_SHORTEST_SECRET = 6


@dataclass(frozen=True, kw_only=True)
class Address:
    """A store's URL, read."""

    kind: Literal["folder", "memory", "objects"]
    place: str
    """A local path, or a URL for fsspec."""


def address(url: str) -> Address:
    """What a store's URL leads to: a local path (`~` expands) or a URL that fsspec opens.

    Raises:
        StoreError: it is empty or looks like a slip of the pen, holds credentials that would be seen, or leads through
            something that breaks a store's promises: a cache, whose readers would see what was there, or fsspec's own
            writes to local files, whose readers could see half of one.
    """
    shown = without_credentials(url)
    if not url:
        raise StoreError("the store's URL is empty: give a folder or a URL such as s3://bucket/folder")
    if _STRANGE.search(url):
        raise StoreError(f"the store's URL {shown!r} begins or ends with a blank or holds a line break; legal: without")
    if slip := _ONE_SLASH.fullmatch(shown):
        legal = f"{slip[1]}:{'///' if slip[1].lower() in _FOLDERS else '//'}{slip[2]}"
        raise StoreError(f"the store {shown}: a URL has two slashes behind its colon; legal: {legal}")
    links = url.split("::") if "://" in url else [url]
    schemes = [(link.partition("://")[0] if "://" in link or len(links) > 1 else "").lower() for link in links]
    for scheme in schemes:
        if scheme in _CACHES:
            behind = without_credentials("::".join(links[schemes.index(scheme) + 1 :])) or "the URL behind it"
            raise StoreError(
                f"the store {shown}: behind a cache nobody sees what others write; legal: {behind}, without {scheme}"
            )
        if scheme in _FOLDERS and len(links) > 1:
            raise StoreError(f"the store {shown}: a local folder is not chained; legal: the folder itself")
    for link, scheme in zip(links, schemes, strict=True):
        if scheme in _BUCKETS:
            _refuse_bucket(link, scheme, shown)
    found = _URL.fullmatch(url) if len(links) == 1 else None
    if found is None:
        return Address(kind="folder", place=_folder(url, shown)) if len(links) == 1 else _objects(links, schemes)
    if schemes[0] in _FOLDERS:
        place = re.sub(r"^localhost(?=/)", "", found[2])
        if not place:
            raise StoreError(f"the store {shown} names no folder; legal: {shown}/path")
        return Address(kind="folder", place=_folder(place, shown))
    if schemes[0] == "memory":
        return Address(kind="memory", place=f"memory://{found[2]}")
    return _objects(links, schemes)


def without_credentials(url: str) -> str:
    """`user:password@`, and the values of arguments such as `?token=`, are left out of every URL in the text."""
    if _ONE_URL.fullmatch(url):
        url = _CREDENTIALS_OF_ONE.sub("://", url)
    return _SECRET_ARGUMENT.sub(r"\1\2***", _CREDENTIALS.sub("://", url))


def without_secrets(text: str, *tables: Mapping[str, Any], url: str = "") -> str:
    """A text that somebody else wrote, as it may be shown: without credentials in URLs, and without any secret of the
    tables, such as the environment, and of a store's `url`, as they are and as they are quoted in URLs."""
    for secret in sorted(secrets_of(url, *tables), key=len, reverse=True):
        text = text.replace(secret, "***")
    return without_credentials(text)


def secrets_of(url: str, *tables: Mapping[str, Any]) -> set[str]:
    """What no message may hold: the URL's password, the texts under names such as SECRET or token, at any depth, and
    the passwords of URLs under any name; each as it is, and as it is quoted in URLs."""
    found = {*_passwords(url), *(secret for table in tables for secret in _secrets(table))}
    quoted = {form for secret in found for form in (quote(secret), quote(secret, safe=""), quote_plus(secret))}
    return found | quoted | {quote(form) for form in quoted} | {unquote(secret) for secret in found}


def _secrets(table: Mapping[str, Any]) -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif isinstance(value, str):
            if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(str(name)):
                yield value
            yield from _passwords(value)


def _passwords(text: str) -> Iterator[str]:
    for word in text.split():
        yield from _PASSWORD.findall(word)


def _folder(path: str, shown: str) -> str:
    if path.startswith("~") and os.path.expanduser(path) == path:
        raise StoreError(f"the store {shown}: no user has that name; legal for a folder that is called so: ./{path}")
    return path


def _objects(links: list[str], schemes: list[str]) -> Address:
    """fsspec knows schemes in lower case."""
    lower = [
        scheme + link[len(scheme) :] if "://" in link else link for link, scheme in zip(links, schemes, strict=True)
    ]
    return Address(kind="objects", place="::".join(lower))


def _refuse_bucket(link: str, scheme: str, shown: str) -> None:
    place = link.partition("://")[2]
    bucket = place.partition("/")[0]
    named = ":" in bucket and not bucket.startswith("arn:")  # as user:password is, its '@' quoted or behind a slash
    if "@" in bucket or named or _SECRET_ARGUMENT.search(link):
        legal = re.split("[?#]", without_credentials(link))[0]
        if ":" in legal.partition("://")[2].partition("/")[0]:  # there is no telling where the secret ends
            shown, legal = f"{scheme}://***", f"{scheme}://bucket/folder"
        how = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if scheme.startswith("s3") else "its own place"
        raise StoreError(
            f"the store {shown}: a URL is seen in logs and in lists of processes, and is no place for credentials; "
            f"legal: {legal}, and the credentials in {how}"
        )
    if not bucket:
        raise StoreError(f"the store {shown} names no bucket; legal: {scheme}://bucket/folder")
    if {".", ".."} & set(place.split("/")):
        raise StoreError(f"the store {shown}: a bucket has no folder above or beside; legal: without '.' and '..'")
