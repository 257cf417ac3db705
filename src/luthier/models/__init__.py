"""Read model directories and load them as a transformers model and a tokenizer."""
