"""What a storage's errors mean, and the way out of each.

S3's own codes are asked for first: s3fs makes them into Python's errors (`PermissionError`, `OSError`), whose cause
has the answer. A HEAD has no body, so its answer has the status for a code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

KEYS = (
    "check the credentials first: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) are not those of this "
    "endpoint, or may not use this bucket; then run again: finished work is kept"
)
NO_KEYS = (
    "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and run again"
)
EXPIRED = (
    "the credentials have expired: get new ones (AWS_SESSION_TOKEN goes with its keys), then run again: finished work "
    "is kept"
)
CLOCK = "this machine's clock is wrong: set it, then run again: finished work is kept"
REGION = "the bucket is in another region: set AWS_DEFAULT_REGION to its region (AWS_REGION goes first), then run again"
NO_ANSWER = (
    "the endpoint does not answer: check storage.endpoint_url (or AWS_ENDPOINT_URL) and the network, then run again: "
    "finished work is kept"
)
BUSY = "the storage is overloaded or failed by itself: wait and run again: finished work is kept"
NO_FOLDER = "it lies below a file: give a folder to --root or storage.root"
DISK = "check space and permissions, then run again: finished work is kept"
REMOTE = "check space, permissions, network and credentials, then run again: finished work is kept"


def _hints(names: dict[str, str]) -> dict[str, str]:
    return {name: hint for hint, of_hint in names.items() for name in of_hint.split()}


_BY_CODE = _hints(
    {
        KEYS: "401 403 AccessDenied AllAccessDisabled AccountProblem InvalidAccessKeyId InvalidClientTokenId "
        "InvalidSecurity InvalidToken NotSignedUp SignatureDoesNotMatch Unauthorized UnrecognizedClientException "
        "XAmzContentSHA256Mismatch",
        EXPIRED: "ExpiredToken ExpiredTokenException RequestExpired TokenRefreshRequired",
        CLOCK: "RequestTimeTooSkewed",
        REGION: "301 307 AuthorizationHeaderMalformed IllegalLocationConstraintException InvalidLocationConstraint "
        "PermanentRedirect Redirect TemporaryRedirect",
        BUSY: "500 502 503 504 InternalError RequestTimeout ServiceUnavailable SlowDown",
    }
)
_BY_NAME = _hints(
    {
        NO_KEYS: "NoCredentialsError PartialCredentialsError",
        KEYS: "CredentialRetrievalError ProfileNotFound UnauthorizedSSOTokenError InvalidConfigError",
        EXPIRED: "SSOTokenLoadError TokenRetrievalError RefreshWithMFAUnsupportedError",
        REGION: "NoRegionError InvalidRegionError",
    }
)
_LIBRARIES = {"botocore", "aiobotocore", "aiohttp"}
_NO_ANSWER = re.compile(r"Connect|Endpoint|Timeout|HTTPClient|SSL|Proxy|gaierror")


def way_out(error: BaseException) -> str | None:
    """The way out of an error that a storage has raised, or None of one that is no storage's."""
    chain = list(_chain(error))
    for cause in chain:
        hint = _BY_CODE.get(code_of(cause)) or _BY_NAME.get(type(cause).__name__)
        if hint is not None:
            return hint
    if any(_is_library(cause) and _NO_ANSWER.search(type(cause).__name__) for cause in chain):
        return NO_ANSWER
    if any(_is_library(cause) for cause in chain):
        return REMOTE
    if isinstance(error, NotADirectoryError):
        return NO_FOLDER
    return DISK if isinstance(error, OSError) else None


def code_of(error: BaseException) -> str:
    """S3's code for an error; empty where it has none."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def told(error: BaseException) -> str:
    """What an error says, with S3's code where its text leaves it out."""
    text = str(error) or type(error).__name__
    code = next((code for code in map(code_of, _chain(error)) if code), "")
    return text if not code or code in text else f"{text} ({code})"


def _is_library(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in _LIBRARIES


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
