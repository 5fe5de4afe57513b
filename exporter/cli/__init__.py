"""The command line: `edgetrim VERB …`. A file of this folder without a leading underscore is a verb.

A verb's module offers `command`, parses options, calls the library and hands the result to `_output`. It imports heavy
packages inside functions only, so that `--help` stays fast and works without them. Only this package prints and exits.

Nothing else stands here: importing `exporter.cli.list` binds `list` in this namespace.
"""

from exporter.cli._app import main

__all__ = ["main"]
