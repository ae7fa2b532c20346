"""From what the user passes to a captured program."""
