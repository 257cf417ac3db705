"""Provide helpers that know nothing about models, such as writing files and directories atomically."""
