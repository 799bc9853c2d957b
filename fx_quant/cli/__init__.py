"""The command line: what it asks (``parser``), how it ends (``run``), and a module for what each command does."""
