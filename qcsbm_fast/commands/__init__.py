"""The commands of `qcsbm`, a file each.

A file `<name>.py`, listed in `cli.COMMANDS`, has

* `Command`, a frozen dataclass: its docstring is the help text, its fields are the options;
* `run(command)`, which does the work; what it needs is imported there, so that help comes quickly;
* and, where defaults depend on other arguments, `defaults(arguments)`: the command that the options override,
  given the arguments after the command's name (none when another command runs).

Errors for the user are raised as `ConfigError` (bad arguments) or `RunError` (it did not work).
"""
