"""The command ``semroute``: one file per subcommand."""
