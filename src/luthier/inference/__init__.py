"""Replies and conversations."""
