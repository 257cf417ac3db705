"""One module per verb, named after it: each calls the other packages, in order."""
