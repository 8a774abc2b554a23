"""Fixtures for all tests. Nothing here may import functok: `FUNCTOK_CACHE` is read when it is imported."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

_CACHE = tempfile.mkdtemp(prefix="functok-test-cache-")
os.environ["FUNCTOK_CACHE"] = _CACHE
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
# No test asks a hub: without this, a name that is nowhere is retried for most of a minute.
os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import HealthCheck, settings  # noqa: E402
from prefect_home import prefect_api, prefect_database  # noqa: E402
from s3 import ceph_server, moto_server, s3_root  # noqa: E402

# A busy machine is no failure.
settings.register_profile("functok", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("functok")

__all__ = ["ceph_server", "moto_server", "prefect_api", "prefect_database", "s3_root"]
