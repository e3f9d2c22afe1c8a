"""The self-contained HTML report: what a section is, and how the page is built."""

from workbench.report.section import ReportContext, Section

__all__ = ["ReportContext", "Section"]
