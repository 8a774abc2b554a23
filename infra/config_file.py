"""Reading a configuration file, with what the command line says instead of it; secrets are refused."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from pydantic import ValidationError

from schemas.config import Config
from schemas.errors import ConfigError
from schemas.sections import explain

_SECRET_KEY = re.compile(r"signature|token|secret|password|credential|api_?key|^sig$", re.IGNORECASE)
_FREE_TEXT = "prompts"


def load_config(
    source: str | Path | Mapping[str, Any] | Config, assignments: Sequence[str] = (), root: str | None = None
) -> Config:
    """Read a configuration, apply `--set key.path=value` and `--root`, and validate.

    Values are parsed as TOML; what is not TOML is taken as a string. A list element is addressed by its
    index (`sae.0.path=…`).

    Args:
        source: A TOML file, its content, or a configuration.
        assignments: What `--set` says.
        root: What `--root` says.

    Raises:
        ConfigError: if the file cannot be read, is not TOML, does not fit the model, or has an address with a
            secret in it.
    """
    values = _values(source)
    for assignment in assignments:
        _assign(values, assignment)
    if root is not None:
        _assign_path(values, ["storage", "root"], root)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        about = f"{source}: " if isinstance(source, str | Path) else ""
        raise ConfigError(
            f"{about}{_explain(error)}",
            hint="schemas/sections.py and schemas/*/section.py say what each key means; configs/ has examples",
        ) from error
    refuse_secrets(config)
    return config


def _values(source: str | Path | Mapping[str, Any] | Config) -> dict[str, Any]:
    """What a source sets, as nested dictionaries that nobody else has."""
    if isinstance(source, Config):
        return source.model_dump(exclude_unset=True)
    if isinstance(source, Mapping):
        return deepcopy(dict(source))
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the configuration {source}: {error}", hint="give the path of a TOML file"
        ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}", hint="see configs/demo.toml") from error


def _explain(error: ValidationError) -> str:
    items = error.errors(include_url=False, include_input=False)
    return "; ".join(
        _told(".".join(map(str, item["loc"])) or "configuration", explain(item, Config)) for item in items
    )


def _told(place: str, message: str) -> str:
    return message if re.match(rf"{re.escape(place)}\b", message) else f"{place}: {message}"


def _assign(values: dict[str, Any], assignment: str) -> None:
    key, separator, raw = assignment.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            f"--set {assignment!r} is not of the form key.path=value",
            hint="for example --set windows.context_size=512",
        )
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    _assign_path(values, key.strip().split("."), value)


def _assign_path(values: dict[str, Any], path: list[str], value: Any) -> None:
    node: Any = values
    for here, part in enumerate(path):
        key: Any = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"--set {'.'.join(path)}: {part!r} is no index of a list of {len(node)}")
            key = int(part)
        elif not isinstance(node, dict):
            raise ConfigError(f"--set {'.'.join(path)}: {'.'.join(path[:here])} is a value, not a section")
        if here == len(path) - 1:
            node[key] = value
        else:
            node = node[key] if isinstance(node, list) else node.setdefault(key, {})


def refuse_secrets(config: Config) -> None:
    """Refuse addresses with secrets: Prefect keeps parameters, and the tables name their sources.

    Every text of the configuration may be an address, chained or not, but those for a model to read.

    Raises:
        ConfigError: naming the setting, not the secret.
    """
    for place, address in _texts(config.model_dump(), ""):
        if any(_has_secret(link) for link in address.split("::")):
            raise ConfigError(
                f"{place} carries a password, a token or a signature, which would be stored with the run",
                hint="give credentials through the environment (AWS_*, HF_TOKEN, .netrc)",
            )


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
        return
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        if key != _FREE_TEXT:
            yield from _texts(item, f"{place}.{key}" if place else str(key))


def _has_secret(link: str) -> bool:
    try:
        parts = urlsplit(link)
    except ValueError:
        return False
    # A user name alone is a token on the web, and no secret to log in elsewhere with (sftp://me@host).
    user = parts.username if parts.scheme in {"http", "https"} else None
    # github://organization:repository@reference is no password.
    password = parts.password if parts.scheme != "github" else None
    keys = [key for key, _ in parse_qsl(parts.query)]
    return bool(parts.scheme and (password or user)) or any(_SECRET_KEY.search(key) for key in keys)
