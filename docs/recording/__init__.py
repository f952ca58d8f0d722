"""The recording in the README: a real cluster, and the picture of its terminal."""
