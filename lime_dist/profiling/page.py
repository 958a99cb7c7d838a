"""A profile as a page of HTML: one file that asks no other for anything, and opens without a network.

Whatever comes from the run is in it as JSON, which the page's script puts in as text and never as markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lime_dist.profiling.accounting import Account
from lime_dist.profiling.page_data import page_data
from lime_dist.profiling.profile_files import Profile
from lime_dist.profiling.timeline import StepTimeline

_PLACE = "@PROFILE@"  # of the data, in page.html


def write_page(
    profile: Profile, timelines: Sequence[StepTimeline], account: Account, path: Path, findings: Sequence[str]
) -> None:
    """findings: sentences, the weightiest first. Raises: OSError."""
    data = json.dumps(page_data(profile, timelines, account, findings), separators=(",", ":"), allow_nan=False)
    template = files("lime_dist.profiling").joinpath("page.html").read_text(encoding="utf-8")
    page = template.replace(_PLACE, data.replace("<", "\\u003c"))  # so that no text ends the script element
    path.write_text(page, encoding="utf-8")
