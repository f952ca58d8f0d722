"""Images as archives, and the confined workers that read and write them."""
