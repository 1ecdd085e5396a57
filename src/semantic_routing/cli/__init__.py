"""semroute, a file for each subcommand."""
