"""Detect the device: its kind, the dtypes it computes in, its memory."""
