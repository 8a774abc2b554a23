"""Addresses of files: the options that fsspec needs for them, what of them may be shown, and whether they answer."""

from __future__ import annotations

import re
from typing import Any


def storage_options(url: str, endpoint_url: str | None) -> dict[str, Any]:
    """fsspec options for `url`: the S3 endpoint where there is one and the URL (or its chain's end) is on S3."""
    if endpoint_url is None:
        return {}
    if url.startswith("s3://"):
        return {"endpoint_url": endpoint_url}
    return {"s3": {"endpoint_url": endpoint_url}} if "::s3://" in url else {}


def without_credentials(url: str) -> str:
    """A URL, chained or not, without `user:password@` and without a query, which may be a signature."""
    links = []
    for link in url.split("::"):
        bare = re.sub(r"^([A-Za-z][\w+.-]*://)[^/]*@", r"\1", link)
        if re.match(r"https?://", bare):
            bare = re.sub(r"[?#].*$", "", bare)
        elif "://" in bare:
            # A question mark that no `name=` follows is part of a glob.
            bare = re.sub(r"\?(?=[\w.~%-]+=).*$", "", bare)
        links.append(bare)
    return "::".join(links)


def is_unreachable(error: BaseException) -> bool:
    """Whether a file seems not to be there only because its host does not answer.

    fsspec's HTTP filesystem raises `FileNotFoundError` from whatever has stopped it.
    """
    # An answer such as 404, or S3's NoSuchKey, is no OSError; a name or a connection that fails is one.
    return isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)
