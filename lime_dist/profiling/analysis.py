"""All that is worked out of a profile, once, for whoever shows it. Pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lime_dist.profiling.accounting import Account, account
from lime_dist.profiling.advice import sentences
from lime_dist.profiling.critical_path import Segment, critical_path
from lime_dist.profiling.findings import Fault, find_faults
from lime_dist.profiling.profile_files import Profile, read_profile
from lime_dist.profiling.timeline import StepTimeline, read_timelines


@dataclass(frozen=True)
class Analysis:
    profile: Profile

    @classmethod
    def read(cls, path: Path) -> Analysis:
        """Of a run or a profile's folder. Raises: ProfileError."""
        return cls(read_profile(path))

    def __str__(self) -> str:
        return f"what was measured in {self.profile.folder}, where a step took {1e3 * self.account.step_seconds:.0f} ms"

    @cached_property
    def timelines(self) -> tuple[StepTimeline, ...]:
        return tuple(read_timelines(self.profile))

    @cached_property
    def account(self) -> Account:
        return account(self.profile, self.timelines)

    @cached_property
    def faults(self) -> Sequence[Fault]:
        return find_faults(self.profile, self.timelines, self.account)

    @cached_property
    def sentences(self) -> list[str]:
        return sentences(self.profile, self.account, self.faults)

    @cached_property
    def mean_step(self) -> StepTimeline:
        """The step nearest to the mean, whose critical path is shown."""
        mean = self.account.step_seconds
        return min(self.timelines, key=lambda timeline: abs(timeline.seconds - mean))

    @cached_property
    def path(self) -> tuple[Segment, ...]:
        return critical_path(self.mean_step)
