"""One module per command of `vidi`, each with ``add_arguments(parser)`` and ``run(args) -> exit code``."""
