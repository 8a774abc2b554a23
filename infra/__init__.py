"""Storage, manifests, DuckDB, Dask and the files that start services."""
