"""A distiller in figures: its levels, and each term's gradient beside the detector's."""

from .levels import LevelReport
from .report import Report, TermReport

__all__ = ["LevelReport", "Report", "TermReport"]
