"""Network tables: derived from the store on every manager, and streamed to the skep nodes that need them."""
