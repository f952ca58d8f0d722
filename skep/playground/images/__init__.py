"""Images for playgrounds, made from the distribution's programs."""
