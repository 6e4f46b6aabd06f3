"""The command line, a file a command: flags in, calls of the other rooms, lines out.

Nothing is computed here. cli.py finds the command and turns errors into exit codes.
"""
