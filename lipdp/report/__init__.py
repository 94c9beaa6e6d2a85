"""The sensitivity report: numbers, text, and a page to read and print."""

from lipdp.report.numbers import Attained, Figures, LayerRow, WeightRow
from lipdp.report.report import Report

__all__ = ["Attained", "Figures", "LayerRow", "Report", "WeightRow"]
