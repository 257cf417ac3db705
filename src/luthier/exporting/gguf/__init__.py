"""Write the model or only the adapter as one GGUF file, and verify it with llama.cpp itself."""
