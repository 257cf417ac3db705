"""The arithmetic of a training step. ``reference`` is the definition that the others are proven against."""
