"""The command line: one thin module a verb. Nothing here imports torch until a verb runs."""
