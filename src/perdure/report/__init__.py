"""One report in three dresses: report.json, a terminal table, a page of plots. Imports no torch."""
