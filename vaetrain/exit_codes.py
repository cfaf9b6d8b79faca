"""With what a command ends, besides 0 and 1."""

EXIT_INCOMPLETE = 3
"""Scores were written, and something failed or was asked for by name and could not be measured."""

EXIT_STOPPED = 75
"""Training saved and stopped because it was told to (EX_TEMPFAIL of sysexits.h): the same command goes on from there."""
