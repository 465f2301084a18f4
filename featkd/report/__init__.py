"""A distiller in figures: its levels, and each term's gradient beside the detector's."""

from .report import Report

__all__ = ["Report"]
