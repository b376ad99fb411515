"""`python -m flows.cli`: the command `tuneproof`."""

from flows.__main__ import main

if __name__ == "__main__":
    main()
