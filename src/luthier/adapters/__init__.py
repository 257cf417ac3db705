"""The adapter directory, run directories, and finding which one is meant."""
