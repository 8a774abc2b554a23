"""functok: which tokens open a language model's memory?

`open` gives the tables of a run, `run` and `status` do what the commands of these names do. This is the one module to
import; what lies beside it and in it may change at any time.

Example:
    >>> import functok
    >>> functok.open("runs/demo").sql("SELECT rank, is_function FROM tokens WHERE rank = 1").fetchall()
    [(1, True)]
"""

from functok import own_packages

own_packages.put_first()

from functok.api import OpenRun, open, run, status  # noqa: E402 - what is beside functok is found as ours from here on
from schemas.version import __version__  # noqa: E402

__all__ = ["OpenRun", "__version__", "open", "run", "status"]
