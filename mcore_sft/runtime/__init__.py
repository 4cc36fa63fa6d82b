"""Where we run: the only room that knows CPU from GPU."""
