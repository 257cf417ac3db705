"""Encode conversations as token ids and loss masks, and store the encoded rows in memory or on disk."""
