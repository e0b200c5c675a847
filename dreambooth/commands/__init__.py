"""The subcommands of `python -m dreambooth` that need a module of their own."""
