"""What a user can run into. Each message is one line that names the key, flag or file and the fix.

The command line prints the line and exits with code 2 (`USER_ERROR_EXIT_CODE`): a launcher must not
restart such a run, since it would fail the same way. Anything else that is raised is a defect of ours
or of the machine and keeps its stack trace.
"""

import reprlib
from typing import Any

USER_ERROR_EXIT_CODE = 2
MAX_LINE = 400

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlist = _SHORT.maxtuple = 8
_SHORT.maxlevel = 3


def one_line(error: BaseException) -> str:
    """The error's text on one line that can be printed; of a text beyond MAX_LINE the middle is left out."""
    text = str(error)
    if len(text) > 100 * MAX_LINE:
        text = f"{text[: 50 * MAX_LINE]} {text[-50 * MAX_LINE :]}"
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 125]} ... {line[-120:]}"


def shown(value: Any) -> str:
    """A user's value as messages show it: its `repr`, shortened where it is long."""
    return _SHORT.repr(value)


class LimeDistError(Exception):
    """Base of all errors that a user can fix."""


class ConfigError(LimeDistError):
    """A key of the run's configuration is unknown, missing, of the wrong type or impossible."""


class LayoutError(ConfigError):
    """The ranks, devices or stages do not fit the model or the machine."""


class PlanError(ConfigError):
    """A depth pattern or transfer plan that cannot be carried out."""


class DataError(LimeDistError):
    """A text, tokenizer or token file that is missing, cut short or does not fit the model."""


class CheckpointError(LimeDistError):
    """A checkpoint that is missing, incomplete or of another model or layout."""


class TrainingDiverged(LimeDistError):
    """A loss, gradient or weight that is not finite. It would come again, so the run is not started again."""
