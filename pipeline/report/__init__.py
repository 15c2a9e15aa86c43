"""The report of one policy: its numbers as JSON, its figures, and one self-contained HTML page."""

from pipeline.report.inputs import ReportError, ReportInput
from pipeline.report.numbers import report_json, report_numbers
from pipeline.report.page import RenderedReport, render

__all__ = [
    "RenderedReport",
    "ReportError",
    "ReportInput",
    "render",
    "report_json",
    "report_numbers",
]
