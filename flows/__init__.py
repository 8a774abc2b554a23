"""Prefect flows: wiring only, one file a flow.

Importing this package sets what keeps Prefect private and offline, before Prefect reads its settings.
"""

from infra.prefect_server import prefect_environment

prefect_environment()
