"""A model on held-out rows: loss, text metrics, base against tuned, report.html."""
