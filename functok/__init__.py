"""functok: which tokens open a language model's memory?"""

from functok import own_packages

own_packages.put_first()

from schemas.version import __version__  # noqa: E402 - found as ours from here on

__all__ = ["__version__"]
