"""What the log of a failed run says: the sentence and the way out, without Prefect's engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from infra.run_log import ClearFailures, in_words
from schemas.errors import ConfigError

LOGGER = "functok-test-runs"
ERROR = ConfigError("no tables are published under 'x'", stage="report", hint="run the tables first")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[logging.Logger]:
    """A logger as Prefect's runs have them."""
    logger = logging.getLogger(LOGGER)
    clear = ClearFailures()
    logger.addFilter(clear)
    caplog.set_level(logging.INFO, logger=LOGGER)
    yield logger
    logger.removeFilter(clear)


def fail(log: logging.Logger, error: BaseException) -> None:
    """Log a failure as Prefect 3.8 logs that of a flow, of a step, and of a step that is tried again."""
    try:
        raise error
    except BaseException as raised:
        log.exception("Encountered exception during execution: %r", raised)
        log.error(f"Task run failed with exception: {raised!r} - Retries are exhausted", exc_info=True)
        log.info("Task run failed with %s: %r - Retry %s/%s will start %s", "exception", raised, 1, 3, "soon")
        log.error("Something else failed", exc_info=True)


def test_a_failure_is_said_in_words(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    fail(log, ERROR)
    words = "[report] no tables are published under 'x'\nWay out: run the tables first"
    assert [record.getMessage() for record in caplog.records] == [
        f"Encountered exception during execution: {words}",
        f"Task run failed with exception: {words} - Retries are exhausted",
        f"Task run failed with exception: {words} - Retry 1/3 will start soon",
        f"Something else failed: {words}",
    ]
    assert "Traceback" not in caplog.text
    assert "ConfigError" not in caplog.text


def test_an_unexpected_failure_names_its_kind_and_how_to_see_more(
    log: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    fail(log, KeyError("weights"))
    assert "unexpected KeyError: 'weights'" in caplog.text
    assert "functok up --debug" in caplog.text
    assert "Traceback" not in caplog.text


def test_percent_signs_of_a_message_are_text(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    fail(log, ConfigError("100%s of %d rows"))
    assert "100%s of %d rows" in caplog.text


def test_debug_shows_tracebacks(log: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger=LOGGER)
    fail(log, ERROR)
    assert caplog.text.count("Traceback (most recent call last)") == 3


def test_what_prefect_itself_refuses_is_left_as_it_says_it() -> None:
    from prefect.exceptions import ParameterTypeError

    error = ParameterTypeError("Flow run received invalid parameters:\n - config.function_tokens.share: …")
    assert in_words(error) == str(error)
