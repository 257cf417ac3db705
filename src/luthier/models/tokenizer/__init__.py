"""A model's tokenizer: read from the published files, exact, without the model's own code."""
