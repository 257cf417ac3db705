"""Spans -> token ids and loss mask; encoded rows in memory and on disk."""
