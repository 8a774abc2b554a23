"""Prefect flows: wiring only, one file a flow."""
