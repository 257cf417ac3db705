"""The files of an adapter and of a run, and how a path is resolved to a base model and an adapter."""
