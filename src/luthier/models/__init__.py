"""Model directories: what is in them, and how they become a transformers model and a tokenizer."""
