"""functok: which tokens open a language model's memory?"""

from schemas.version import __version__

__all__ = ["__version__"]
