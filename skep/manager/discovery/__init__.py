"""Network tables: derived from the store on every manager, streamed to the skep nodes that take part."""
