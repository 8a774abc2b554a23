"""Corpus files: from the URLs and globs of the configuration to a list of files in order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import fsspec

from infra.addresses import failed_at, is_unreachable, storage_options, without_credentials
from infra.hashing import content_hash
from schemas.config import Config
from schemas.errors import ConfigError, CorpusError, StorageError

_FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """One file of the corpus.

    Attributes:
        url: Its fsspec URL, no globs.
        format: `jsonl`, `json`, `csv`, `tsv`, `txt` or `parquet`.
        compression: `gzip`, `zstd`, `bz2`, `xz` or none, as asked for or as its name says.
        size: Bytes as stored, for progress.
        endpoint_url: S3 endpoint if not AWS.
    """

    url: str
    format: str
    compression: str | None
    size: int
    endpoint_url: str | None = None


def corpus_files(config: Config) -> list[CorpusFile]:
    """The corpus' files: `corpus.urls` in order, globs expanded and sorted.

    Raises:
        ConfigError: if a URL matches nothing, has no known format, holds a password, or a file comes twice.
        StorageError: if a URL cannot be listed.
    """
    files: list[CorpusFile] = []
    endpoint = config.storage.endpoint_url
    for url in config.corpus.urls:
        if re.search(r"://[^/@]*:[^/@]*@", url):
            raise ConfigError("a corpus URL holds a password", hint="credentials belong in the environment")
        files += [_describe(found, config) for found in _expand(url, endpoint)]
    seen: set[str] = set()
    for file in files:
        if file.url in seen:
            raise ConfigError(
                f"corpus.urls: {without_credentials(file.url)} is in the corpus twice",
                hint="its tokens would count double",
            )
        seen.add(file.url)
    return files


def content_of(file: CorpusFile) -> str:
    """A hash of what a file holds.

    Raises:
        CorpusError: if it cannot be read.
    """
    try:
        return content_hash(file.url, file.endpoint_url)
    except OSError as error:
        raise CorpusError(f"cannot read {failed_at(file.url, error)}", stage="tokenize") from error


def _expand(url: str, endpoint: str | None) -> list[str]:
    try:
        found = fsspec.open_files(url, "rb", expand=True, **storage_options(url, endpoint))
        urls = [_url_of(url, file) for file in found]
    except (FileNotFoundError, NotADirectoryError):
        urls = []
    except (ValueError, ImportError) as error:
        raise ConfigError(f"corpus.urls: cannot understand {without_credentials(url)}: {error}") from error
    except Exception as error:
        raise _unanswered(url, error) from error
    if not urls:
        raise ConfigError(
            f"corpus.urls: {without_credentials(url)} matches no file",
            hint="check the path; globs use * and **",
        )
    return sorted(urls)


def _url_of(asked: str, file: Any) -> str:
    head, separator, rest = asked.partition("::")
    if separator:
        return f"{head.partition('://')[0]}://{file.path}::{rest}"
    return str(file.fs.unstrip_protocol(file.path)) if "://" in asked else str(file.path)


def _describe(url: str, config: Config) -> CorpusFile:
    corpus, endpoint = config.corpus, config.storage.endpoint_url
    if not is_unicode(url):
        raise ConfigError(
            f"corpus.urls: the name of {without_credentials(url)!r} is not valid UTF-8",
            hint="rename the file: the tables name their sources",
        )
    size = _size(url, endpoint)
    link = url.partition("::")[0].lower()
    # A query may follow the name, or hold it (…/get?path=corpus.jsonl).
    kinds = [_kind_of(name) for name in (without_credentials(link), link)]
    kind, compression = next((found for found in kinds if found[0] is not None), kinds[0])
    if corpus.format != "auto":
        kind = corpus.format
    if corpus.compression != "auto":
        compression = None if corpus.compression == "none" else corpus.compression
    if kind is None or (kind == "parquet" and compression):
        raise ConfigError(
            f"corpus.urls: {without_credentials(url)} has no known format",
            hint=f"known: {', '.join(_FORMATS)}; all but .parquet also with {', '.join(_COMPRESSIONS)}; corpus.format "
            "says what other names hold, a glob such as *.jsonl leaves them out",
        )
    return CorpusFile(url=url, format=kind, compression=compression, size=size, endpoint_url=endpoint)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind_of(name: str) -> tuple[str | None, str | None]:
    """Format and compression by a name's end."""
    compression = next((kind for suffix, kind in _COMPRESSIONS.items() if name.endswith(suffix)), None)
    stem = name.rsplit(".", 1)[0] if compression else name
    return next((kind for suffix, kind in _FORMATS.items() if stem.endswith(suffix)), None), compression


def _size(url: str, endpoint: str | None) -> int:
    try:
        fs, path = fsspec.core.url_to_fs(url, **storage_options(url, endpoint))
        if fs.isdir(path):
            raise ConfigError(
                f"corpus.urls: {without_credentials(url)} is a folder",
                hint=f"name its files, such as {without_credentials(url).rstrip('/')}/*.jsonl",
            )
        return int(fs.info(path).get("size") or 0)
    except ConfigError:
        raise
    except Exception as error:
        if is_unreachable(error):
            # What stopped it, not that a file is missing, says whether another try can help.
            raise _unanswered(url, error) from error.__cause__
        if isinstance(error, FileNotFoundError):
            raise ConfigError(f"corpus.urls: {without_credentials(url)} is not there") from error
        raise _unanswered(url, error) from error


def _unanswered(url: str, error: Exception) -> StorageError:
    return StorageError(
        f"cannot list {failed_at(url, error)}",
        hint="check the URL, the network and credentials",
        stage="tokenize",
    )
