"""The ``skep`` command: one module per command, loaded only when it is used."""
