"""The command line, one file per command: reads flags, calls the other packages, prints results.

Nothing is computed here. cli.py finds the command and turns errors into exit codes.
"""
