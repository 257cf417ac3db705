"""Compare the base and the tuned model on held-out rows by loss and text metrics, and write report.html."""
