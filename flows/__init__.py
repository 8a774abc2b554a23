"""Prefect flows: wiring only, one file a flow.

Importing this package sets what keeps Prefect private and offline, before Prefect reads its settings, and has failed
runs log a sentence instead of a traceback.
"""

from infra.prefect_server import prefect_environment
from infra.run_log import tell_failures_clearly

prefect_environment()
tell_failures_clearly()
