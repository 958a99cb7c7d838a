"""What a user can run into. Each message is one line that names the key, flag or file and the mend.

The command line prints the line and exits with code 2 (`USER_ERROR_EXIT_CODE`): a launcher must not
restart such a run, since it would fail the same way. Anything else that is raised is a defect of ours
or of the machine and keeps its stack trace.
"""

USER_ERROR_EXIT_CODE = 2


def one_line(error: BaseException) -> str:
    """The error's text on one line."""
    return " ".join(str(error).split())


class LimeDistError(Exception):
    """Base of all errors that a user can mend."""


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
