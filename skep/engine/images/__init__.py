"""Images of this node: references, configurations, layers; pulled, built, loaded, pushed, saved and removed.

``store`` is the entry point: ``ImageStore`` resolves, loads, pulls, saves, tags and removes images.  Its parts are
``reference`` (names), ``digest`` (content addresses), ``image`` (configuration and state of an image), ``layers``
(directories for overlayfs), ``untar`` (the chrooted worker that unpacks), ``archive`` (docker save and load),
``registry`` (the distribution protocol), ``removal`` and ``listing`` (decisions).
"""
