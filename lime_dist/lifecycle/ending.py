"""How a run ends: the exit codes that every launcher here reads, and the file that carries them past launchers
which lose them. Knows no rank and no scheduler. No torch.

torchrun turns any worker's exit code into 1, and srun reports the ranks that it killed itself after the first
one left. So whoever launches names a file in `LIME_DIST_OUTCOME_FILE`, one for each start, and believes it rather than the code.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from lime_dist.errors import USER_ERROR_EXIT_CODE, one_line

DONE = 0  # all steps done
NEVER_RESTART = USER_ERROR_EXIT_CODE  # it would end the same way again
REQUEUE = 75  # stopped on request, after saving a complete checkpoint (sysexits.h: EX_TEMPFAIL)
INTERRUPTED = 130  # by Ctrl-C, as shells number it: 128 + SIGINT
READER_GONE = 141  # whoever read its output, as shells number it: 128 + SIGPIPE
FAILED = 1  # as any other code: worth another try, within the launcher's bound

OUTCOME_VARIABLE = "LIME_DIST_OUTCOME_FILE"
_TORCHRUNS_VARIABLE = "TORCHELASTIC_ERROR_FILE"
_WRITING_SECONDS = 0.5


def write_outcome(code: int, reason: str | BaseException) -> bool:
    """Tell the launcher how the run ended. The first rank that knows is the one that saw the cause; later ones are ignored.

    Whether this is news: false where another process of this start has told the very same.
    """
    path, text = _outcome_path(), one_line(reason) if isinstance(reason, BaseException) else reason
    if path is None:
        return True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(f"{code} {text}\n")
    except FileExistsError:
        return _await_outcome(path) != (code, text.strip())
    except OSError:  # the disk is gone: the exit code still tells
        pass
    return True


def _outcome_path() -> Path | None:
    """Under torchrun alone, which gives each start a folder and each rank one within it, a file beside those."""
    if named := os.environ.get(OUTCOME_VARIABLE):
        return Path(named)
    of_rank = os.environ.get(_TORCHRUNS_VARIABLE)
    return Path(of_rank).parents[1] / "outcome" if of_rank else None


def _await_outcome(path: Path) -> tuple[int, str] | None:
    """As the process that has made the file writes it."""
    deadline = time.monotonic() + _WRITING_SECONDS
    while (found := read_outcome(path)) is None and time.monotonic() < deadline:
        time.sleep(_WRITING_SECONDS / 50)
    return found


def read_outcome(path: Path) -> tuple[int, str] | None:
    """(code, reason), or None when no rank wrote one."""
    try:
        code, _, reason = path.read_text(encoding="utf-8").strip().partition(" ")
        return int(code), reason
    except (OSError, ValueError):
        return None
