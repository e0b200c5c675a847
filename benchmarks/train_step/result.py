"""The rows that `python -m benchmarks train` has measured, and the rates and ratios of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.train_step.ours import RunOutcome
from benchmarks.train_step.peer import PeerOutcome

if TYPE_CHECKING:  # it loads torch
    from benchmarks.train_step.graph_check import GraphCheck
    from benchmarks.train_step.work import PeakRates


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The outcome of one setting, with the FLOPs and the shortest possible time of its step."""

    outcome: RunOutcome
    flops: int
    floor_ms: float
    peer: PeerOutcome | None

    @property
    def faults(self) -> list[str]:
        """Return our fault and the peer's, if any."""
        both = (self.outcome, self.peer)
        return [each.fault for each in both if each is not None and each.fault is not None]

    @property
    def rates(self) -> dict[str, float]:
        """Return speeds and the share of the floor; empty for a setting with a fault."""
        figures = self.outcome.figures
        if figures is None:
            return {}
        return {
            "pictures_per_s": 1000 * self.outcome.setting.pictures / figures.times.mean_ms,
            "tflop_per_s": self.flops / figures.times.median_ms / 1e9,
            "share_of_floor": self.floor_ms / figures.times.median_ms,
        }

    @property
    def ratios(self) -> dict[str, float]:
        """Return the peer's times / ours; empty unless both runs succeeded."""
        figures, theirs = self.outcome.figures, self.peer.figures if self.peer else None
        if figures is None or theirs is None:
            return {}
        return {
            "ratio": theirs.times.median_ms / figures.times.median_ms,
            "ratio_mean": theirs.times.mean_ms / figures.times.mean_ms,
            "ratio_whole_run": theirs.run_s / figures.without_class_images_s,
        }

    def document(self) -> dict[str, Any]:
        """Return the row for JSON."""
        figures, theirs = self.outcome.figures, self.peer.figures if self.peer else None
        plain: dict[str, Any] = {
            **asdict(self.outcome.setting),
            "flops_per_step": self.flops,
            "floor_ms": self.floor_ms,
            "faults": self.faults,
        }
        if figures is not None:
            plain |= {**asdict(figures), "of_expected": figures.of_expected, **self.rates}
            # A whole job with "auto" shows the memory plan that it took.
            plain["memory_plan"] = figures.memory_plan or self.outcome.setting.memory_plan
        if theirs is not None:
            plain["peer"] = asdict(theirs)
        return plain | self.ratios


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """All rows. stand_in: the peer ran without the real torchvision. graphs: only on CUDA."""

    rows: tuple[Row, ...]
    peak: PeakRates
    stand_in: bool
    graphs: GraphCheck | None = None

    @property
    def failed(self) -> bool:
        """Return whether a run or the check of the CUDA graphs failed."""
        wrong = self.graphs is not None and self.graphs.fault is not None
        return wrong or any(row.faults for row in self.rows)
