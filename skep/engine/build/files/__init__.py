"""The files that COPY and ADD put into an image, and where they come from."""
