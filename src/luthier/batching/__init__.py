"""Plan which rows each step sees, group them into micro-batches, and share common prefixes."""
