"""``skep top``: the cluster live on a terminal.  Only this folder uses Textual."""
