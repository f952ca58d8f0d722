"""What names of services stand for on a network: the truth that a node's answers are compared with."""

from skep.manager.discovery.book import Book
from skep.model.paths import NetworkNames

NAMES_MAX = 200
"""Of one network."""


def names_in(book: Book) -> NetworkNames | None:
    """The names of services with virtual addresses; None: nobody asks for names there.

    A name that several services have, or a service without a virtual address, is left out: what such a name gives
    changes with each of their tasks.
    """
    if book.head is None or book.head.is_ingress:
        return None
    found: dict[str, tuple[str, ...]] = {}
    several: set[str] = set()
    for service in book.services.values():
        for name in dict.fromkeys((service.name, *service.aliases)):
            if name in found:
                several.add(name)
            found[name] = tuple(sorted(service.virtual_ips))
    names = sorted(name for name, addresses in found.items() if addresses and name not in several)
    return NetworkNames(
        network_id=book.id,
        network=book.head.name,
        names={name: found[name] for name in names[:NAMES_MAX]},
    )
