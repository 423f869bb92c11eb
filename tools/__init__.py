import command_line  # noqa: F401 - before all else, since Ctrl-C and closed streams are its matter
