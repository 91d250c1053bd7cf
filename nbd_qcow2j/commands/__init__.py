"""The subcommands of `nbd-qcow2j`, a module each: `add_parser(subparsers)` and `run(arguments) -> exit code`."""
