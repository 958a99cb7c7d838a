"""`python -m lime_dist`: the command line, for those who know their Python and not where it puts commands."""

from lime_dist.cli.command_line import run

run()
