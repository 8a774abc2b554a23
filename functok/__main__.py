"""`python -m functok` is the `functok` command."""

from functok.cli import main

if __name__ == "__main__":
    main()
