"""Units, stages, checks and tables: written once, for all stages."""
