"""The verbs: one module per verb, named after it, that calls the other packages in order."""
