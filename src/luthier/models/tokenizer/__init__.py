"""Load a model's tokenizer exactly from its published files, without running the model's own code."""
