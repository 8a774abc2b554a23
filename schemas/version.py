"""functok's version, which tables keep beside what they were made of."""

__version__ = "0.1.0"
