"""One file for llama.cpp: the model or the adapter alone, verified by llama.cpp itself."""
