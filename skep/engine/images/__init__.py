"""Stores the images of this node: their references, configurations and layers.

``store`` is the entry point: ``ImageStore`` resolves, loads, pulls, saves, tags and removes images.  Its parts are
``reference`` (names), ``digest`` (content addresses), ``image`` (configuration and state of an image), ``layers``
(directories for overlayfs), ``untar`` (the chrooted worker that unpacks), ``archive`` (docker save and load),
``registry`` (the distribution protocol), ``removal`` and ``listing`` (decisions).
"""
