"""``skep top``: the live cluster on a terminal.  Only this folder uses Textual."""
