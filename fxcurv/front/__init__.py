"""The front end: from what the user passes to a captured program."""
