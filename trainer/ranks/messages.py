"""Keys under which a rank leaves a message in the store for all others, whatever those are doing."""

CRASHED = "crashed"
"""A rank ended through a fault of its own; the value says which rank and what fault."""
STOPPED = "stopped"
"""The ranks agreed on a stop; the value is JSON: the ending's cause, and how many seconds to hold."""
END_WRITTEN = "end-written"
"""Rank 0 has written the attempt's end event, so the other ranks may leave."""
