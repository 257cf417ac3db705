"""The arithmetic of a training step as plain functions; ``reference`` is the definition the others are proven against."""
