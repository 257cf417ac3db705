"""What a device offers: its kind, the types it computes in, its memory."""
