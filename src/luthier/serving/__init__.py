"""An OpenAI-compatible server: a batching engine of our own, several adapters over one base."""
