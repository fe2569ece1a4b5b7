"""One file a command. A file here is a command, under its own name, with

- ``ABOUT``, one line for the help, and ``EXAMPLE``, a command line that works;
- ``options(command)``, which adds arguments to the command's parser, and ``run(arguments) -> int``, the exit status,
  which imports what it needs when it runs; or ``take_over(rest) -> int``, for a command that reads its own options;
- ``PLACE`` in the help's list (default: the end), and ``RESUMES = True`` where the same command goes on after a stop.
"""
