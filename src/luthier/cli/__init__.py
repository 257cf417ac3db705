"""The command line: one thin module per verb, which declares the options and prints the result.

Nothing here imports torch until a verb runs.
"""
