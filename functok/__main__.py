"""The `functok` command, from its first instruction: Ctrl-C is answered before anything slow is imported."""

import os
import sys

from infra.interrupt import STATUS, end_interrupted, interruptible


def main() -> None:
    """Run the command, and leave at once where Ctrl-C has ended it."""
    try:
        try:
            with interruptible():
                from functok.cli import main as run

                run()
        except KeyboardInterrupt:
            end_interrupted()
    except SystemExit as ended:
        if ended.code == STATUS:
            # Threads that still compute would be waited for, and what they print would come after the last word.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(STATUS)
        raise


if __name__ == "__main__":
    main()
