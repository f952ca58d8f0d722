"""Looks up containers among those on this node that a user's roles allow to see."""

from skep.api.access.permissions import sees
from skep.engine.containers.container import Container
from skep.engine.engine import Engine
from skep.errors import InvalidArgument, NotFound
from skep.model.permissions.access import Identity


def visible_container(engine: Engine | None, identity: Identity, word: str) -> Container:
    """Return the container that ``word`` means, among the containers that ``docker ps`` shows to ``identity``.

    Any other container is reported as missing.  Otherwise its id could be found letter by letter, because ``word`` may
    be an id prefix.

    Raises:
        NotFound: The identity sees no such container.
        InvalidArgument: The prefix matches several containers that the identity may see.
    """
    missing = NotFound(f"No such container: {word}")
    if engine is None:
        raise missing
    ambiguous: InvalidArgument | None = None
    try:
        found = engine.get(word)
        if sees(identity, found.stack):
            return found
    except InvalidArgument as error:
        ambiguous = error
    shown = [one for one in engine.list() if word and one.id.startswith(word) and sees(identity, one.stack)]
    if len(shown) == 1:
        return shown[0]
    if shown:
        raise ambiguous or InvalidArgument(f"multiple IDs found with provided prefix: {word}")
    raise missing
