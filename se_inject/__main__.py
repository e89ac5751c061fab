"""``python -m se_inject`` is the command."""

from .cli import main

main(prog_name="se-inject")
