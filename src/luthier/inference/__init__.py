"""Generate replies with a model, and hold conversations with it."""
