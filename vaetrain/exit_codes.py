"""With what a command ends, besides 0 and 1."""

EXIT_INCOMPLETE = 3
"""Something that was asked for by name is missing; everything else has been done."""

EXIT_STOPPED = 75
"""Training saved and stopped because it was told to (EX_TEMPFAIL of sysexits.h): the same command goes on from there."""
