"""``python -m offload``: the command line."""

from offload.cli import main

main()
