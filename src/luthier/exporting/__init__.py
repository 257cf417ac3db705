"""A tuned model in other tools' formats, each read back before it is called done."""
