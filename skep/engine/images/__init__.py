"""Images of this node: references, content, layers; how they come in, go out and go away.

``store`` is the door: ``ImageStore`` resolves, loads, pulls, saves, tags, removes.  The rest are its parts:
``reference`` (names), ``digest`` (content addresses), ``image`` (what an image is), ``layers`` (directories
for overlayfs), ``untar`` (the chrooted worker that unpacks), ``archive`` (docker save and load), ``registry``
(the distribution protocol), ``removal`` and ``listing`` (decisions).
"""
