"""Read data files and turn their rows into conversations, with a report on every row."""
