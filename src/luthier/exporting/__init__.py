"""Write a tuned model in the formats of other tools, and verify each result by reading it back."""
