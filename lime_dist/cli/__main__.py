"""`python -m lime_dist.cli`: for scripts that know their Python and not where it puts commands."""

from lime_dist.cli.command_line import run

run()
