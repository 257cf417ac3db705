"""Compute attention, dropout and the operations in C++; ``reference`` has definitions that they are tested against."""
