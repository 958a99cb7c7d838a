"""How a run ends: the exit codes that every launcher here reads, and the file that carries them past launchers
which lose them. Knows no rank and no scheduler. No torch.

torchrun turns any worker's exit code into 1, and srun reports the ranks that it killed itself after the first
one left. So whoever launches names a file in `LIME_DIST_OUTCOME_FILE`, one for each start, and believes it rather than the code.
"""

from __future__ import annotations

import os
from pathlib import Path

from lime_dist.errors import USER_ERROR_EXIT_CODE, one_line

DONE = 0  # all steps done
NEVER_RESTART = USER_ERROR_EXIT_CODE  # it would end the same way again
REQUEUE = 75  # stopped on request, after saving a complete checkpoint (sysexits.h: EX_TEMPFAIL)
INTERRUPTED = 130  # by Ctrl-C, as shells number it: 128 + SIGINT
READER_GONE = 141  # whoever read its output, as shells number it: 128 + SIGPIPE
FAILED = 1  # as any other code: worth another try, within the launcher's bound

OUTCOME_VARIABLE = "LIME_DIST_OUTCOME_FILE"


def write_outcome(code: int, reason: str | BaseException) -> None:
    """Tell the launcher how the run ended. The first rank that knows is the one that saw the cause; later ones are ignored."""
    path = os.environ.get(OUTCOME_VARIABLE)
    if not path:
        return
    text = one_line(reason) if isinstance(reason, BaseException) else reason
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(f"{code} {text}\n")
    except OSError:  # another rank was first, or the disk is gone: the exit code still tells
        pass


def read_outcome(path: Path) -> tuple[int, str] | None:
    """(code, reason), or None when no rank wrote one."""
    try:
        code, _, reason = path.read_text(encoding="utf-8").strip().partition(" ")
        return int(code), reason
    except (OSError, ValueError):
        return None
