"""The subcommands of semroute data other than index: stats, preview and recaption."""
