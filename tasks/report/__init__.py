"""The report: page, text, findings, charts."""
