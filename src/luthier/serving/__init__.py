"""Serve models over an OpenAI-compatible API, with continuous batching and several adapters on one base model."""
