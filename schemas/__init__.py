"""Configuration, table schemas and expectations."""
