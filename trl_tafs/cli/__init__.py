"""The `trl-tafs` command, a file a subcommand."""
