"""Figures of bags and their attention, and the HTML report of a run."""

from bigbag.visualize.report import write_report

__all__ = ["write_report"]
