"""Addresses of files: the options that fsspec needs for them, what of them may be shown, and whether they answer."""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from schemas.config import Config


def storage_options(url: str, endpoint_url: str | None) -> dict[str, Any]:
    """fsspec options for `url`: the S3 endpoint where there is one and the URL (or its chain's end) is on S3."""
    if endpoint_url is None:
        return {}
    if url.startswith("s3://"):
        return {"endpoint_url": endpoint_url}
    return {"s3": {"endpoint_url": endpoint_url}} if "::s3://" in url else {}


def root_name(root: str, endpoint_url: str | None = None) -> str:
    """A root's short name, for keys and titles: the last part of its path, and six digits of the whole address.

    Lowercase letters, digits and dashes only, as Prefect's keys want it; the same on every machine for an address on
    S3, and two roots whose paths end alike have two names.

    Args:
        root: A local path, relative or not, or a URL.
        endpoint_url: S3 endpoint, if not AWS.
    """
    local = root.removeprefix("file://").removeprefix("local://")
    address = root.rstrip("/") if "://" in local else os.path.abspath(os.path.expanduser(local))
    last = re.sub(r"[^a-z0-9]+", "-", address.rsplit("/", 1)[-1].lower())[:24].strip("-")
    digits = hashlib.sha256(f"{address} {endpoint_url or ''}".encode()).hexdigest()[:6]
    return f"{last}-{digits}" if last else digits


def short_name(model: str) -> str:
    """A model as people call it: a hub id as it is, of a path or an address the last part."""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not os.path.exists(model)
    return model if is_hub_id else model.rstrip("/").rsplit("/", 1)[-1]


def title_of(config: Config) -> str:
    """What a run is about and where it writes, for its name: `SmolLM2-135M in demo-3f9a1c`."""
    return f"{short_name(config.subject)} in {root_name(config.storage.root, config.storage.endpoint_url)}"


def without_credentials(url: str) -> str:
    """A URL, chained or not, without `user:password@` and without a query, which may be a signature."""
    if not any(sign in url for sign in "@?#"):
        return url
    links = []
    for link in url.split("::"):
        bare = re.sub(r"^((?!github:)[A-Za-z][\w+.-]*://)[^/]*@", r"\1", link)
        if re.match(r"https?://", bare):
            bare = re.sub(r"[?#].*$", "", bare)
        elif "://" in bare:
            # A question mark that no `name=` follows is part of a glob.
            bare = re.sub(r"\?(?=[\w.~%-]+=).*$", "", bare)
        links.append(bare)
    return "::".join(links)


def failed_at(url: str, error: BaseException) -> str:
    """An address and what may be shown of an error in reading it: its text may hold the address, and that a secret."""
    shown = without_credentials(url)
    return f"{shown}: {error if shown == url else type(error).__name__}"


def is_unreachable(error: BaseException) -> bool:
    """Whether a file seems not to be there only because its host does not answer.

    fsspec's HTTP filesystem raises `FileNotFoundError` from whatever has stopped it.
    """
    # An answer such as 404 or S3's NoSuchKey is no OSError, or, of the Hugging Face hub, one with a response; a name or
    # a connection that fails is an OSError without.
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    has_answer = getattr(cause, "response", None) is not None
    return isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError) and not has_answer
