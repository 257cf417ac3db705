"""Small parts that know nothing of models: files that are whole or absent."""
