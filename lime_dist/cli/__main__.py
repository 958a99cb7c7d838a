"""`python -m lime_dist.cli`, as the scripts of jobs say it: the same as `python -m lime_dist`."""

from lime_dist.cli.command_line import run

run()
