"""The language of Dockerfiles: parsing, variables, patterns, checks. Pure."""
