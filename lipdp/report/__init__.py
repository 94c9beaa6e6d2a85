"""The sensitivity report: numbers, text, and a page to read and print."""

from lipdp.report.numbers import Attained, LayerRow, Report, RichText, WeightRow, number

__all__ = [
    "Attained",
    "LayerRow",
    "RichText",
    "Report",
    "WeightRow",
    "number",
]
