"""Converts labels for Traefik 2 and 3 to routes of the front door.  Pure.

A router becomes the label ``skep.http``, its middlewares and its service become options.  Each label that a route
cannot express is refused by name.  A router is refused as a whole if a middleware is missing without which strangers
would get in (``basicauth``) or the service would get other paths (``replacepath``).

Source: doc.traefik.io, routing and middlewares of the Docker and Swarm providers of Traefik 2.11 and 3.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Final

import msgspec

from skep.errors import InvalidArgument
from skep.imports.document import Note
from skep.imports.traefik_middlewares import MiddlewareEffects, effects_of, listed
from skep.imports.traefik_rules import RuleAddress, addresses_of
from skep.model.door.claims import Claimant, settled
from skep.model.door.routes import HEADER_OPTIONS, HTTP, OPTIONS, has_routes, parsed_routes
from skep.model.values.ids import ServiceId
from skep.model.values.stacks import STACK_LABEL

PREFIX: Final = "traefik."
_HTTP: Final = "traefik.http."
_PLAIN_ENTRIES: Final = frozenset({"web", "http"})
_SECURE_ENTRIES: Final = frozenset({"websecure", "https"})
"""Names of entry points at the ports 80 and 443 in Traefik's documentation.  The names are the user's choice."""
_NEEDLESS: Final = frozenset(
    {
        "traefik.enable",
        "traefik.constraint-label",
        "traefik.docker.network",
        "traefik.swarm.network",
        "traefik.docker.lbswarm",
        "traefik.swarm.lbswarm",
    }
)
"""Labels that tell Traefik where to look.  The front door has its own network and follows labels of its own."""
_ROUTER_OPTIONS: Final = {
    "tls.options": "the front door accepts TLS 1.2 and later",
    "tls.domains": "a certificate is ordered for each host. A wildcard needs a route like *.example.com",
    "observability": "requests are counted and logged for all routes",
}
_BALANCER_OPTIONS: Final = {
    "healthcheck": "the front door follows the health check of the containers. Set one with --health-cmd",
    "passhostheader": "services always get the host of the request",
    "responseforwarding": "responses are never held back",
    "serverstransport": "the front door speaks plain HTTP to containers",
    "sticky.cookie": "the name of the cookie begins with skep-door, with HttpOnly and SameSite=Lax",
    "weighted": "weights follow tasks. For a share of the requests, update with skep.update=canary",
    "mirroring": "requests are not copied",
    "failover": "requests are led to healthy tasks only",
    "server.scheme": "the front door speaks HTTP or h2c to containers",
}
_LIMITS: Final = ("allow", "max-body", "rate")
"""Options of which a route has one, and of which Traefik applies each."""
_AS_IN_SKEP: Final = {
    "passhostheader": {"true"},
    "sticky.cookie.httponly": {"true"},
    "sticky.cookie.samesite": {"lax"},
    "server.scheme": {"http", "h2c"},
}
"""Options that agree with the front door at these values."""


class TraefikRoutes(msgspec.Struct, frozen=True, kw_only=True):
    """A service's labels for the front door.

    Args:
        refused: Labels that a route cannot express, each with the reason.
        differences: Labels that are converted, and have another effect than in Traefik.
    """

    labels: Mapping[str, str] = {}
    refused: tuple[Note, ...] = ()
    differences: tuple[Note, ...] = ()


class _Router(msgspec.Struct, frozen=True, kw_only=True):
    """A router that can be converted."""

    name: str
    owner: str
    """The service that its requests are led to."""
    addresses: tuple[RuleAddress, ...]
    priority: int
    is_secure: bool
    redirects: bool
    """Whether it redirects to HTTPS."""
    options: Mapping[str, str]

    @property
    def rule_label(self) -> str:
        return f"{_HTTP}routers.{self.name}.rule"


def is_for_traefik(labels: Mapping[str, str]) -> bool:
    """Return whether a service has labels for Traefik."""
    return any(name.lower().startswith(PREFIX) for name in labels)


def converted(services: Mapping[str, Mapping[str, str]]) -> dict[str, TraefikRoutes]:
    """Return the labels for the front door of each service that has labels for Traefik.

    Args:
        services: The labels of all services by name, because middlewares and routers may be on others.
    """
    return _Cluster(services).conversions()


class _Section(msgspec.Struct, kw_only=True):
    """The options of a router, a middleware or a service, by the end of their labels in lower case."""

    owner: str
    prefix: str
    options: dict[str, str] = {}
    is_used: bool = False

    def label(self, option: str) -> str:
        return f"{self.prefix}.{option}" if option else self.prefix


class _Cluster:
    """The conversion of all services, which can use each other's middlewares."""

    def __init__(self, services: Mapping[str, Mapping[str, str]]) -> None:
        self._labels = {name: labels for name, labels in sorted(services.items()) if is_for_traefik(labels)}
        self._routers: dict[tuple[str, str], _Section] = {}
        self._middlewares: dict[str, _Section] = {}
        self._services: dict[tuple[str, str], _Section] = {}
        self._written = {name.lower(): name for labels in self._labels.values() for name in labels}
        """Each label as its user wrote it."""
        self._refused: dict[str, dict[Note, None]] = {name: {} for name in self._labels}
        self._differences: dict[str, dict[Note, None]] = {name: {} for name in self._labels}

    def conversions(self) -> dict[str, TraefikRoutes]:
        """Return the result."""
        for name, labels in self._labels.items():
            self._read(name, labels)
        routers = [one for section in self._routers.values() if (one := self._router(section)) is not None]
        for section in (*self._middlewares.values(), *self._services.values()):
            for option in () if section.is_used else section.options:
                self._refuse(section.owner, section.label(option), "no router that can be converted uses it")
        routers = self._without_twins(routers)
        self._compare_priorities(routers)
        made = {
            name: self._route_labels(name, [one for one in routers if one.owner == name])
            for name in self._labels
        }
        self._compare_stacks(made)
        return {
            name: TraefikRoutes(
                labels=one,
                refused=tuple(sorted(self._refused[name])),
                differences=tuple(sorted(self._differences[name])),
            )
            for name, one in made.items()
        }

    def _refuse(self, owner: str, label: str, reason: str) -> None:
        self._refused[owner][Note(self._written.get(label.lower(), label), reason)] = None

    def _differ(self, owner: str, label: str, text: str) -> None:
        self._differences[owner][Note(self._written.get(label.lower(), label), text)] = None

    # -- reading -----------------------------------------------------------------------------------------------------

    def _read(self, owner: str, labels: Mapping[str, str]) -> None:
        """Sort a service's labels into sections, or refuse them."""
        given = {name.lower(): (name, value) for name, value in sorted(labels.items())}
        given = {key: one for key, one in given.items() if key.startswith(PREFIX)}
        if given.get("traefik.enable", ("", ""))[1].lower() == "false":
            self._refuse(
                owner, "traefik.enable", "Traefik ignores this service. Set it to true to convert the others"
            )
            return
        for key, (name, value) in given.items():
            parts = key.split(".")
            if key in _NEEDLESS:
                continue
            if parts[1] in ("tcp", "udp"):
                self._refuse(owner, name, "the front door routes HTTP. Publish the port with --publish")
            elif (
                parts[1] != "http" or len(parts) < 5 or parts[2] not in ("routers", "middlewares", "services")
            ):
                self._refuse(
                    owner, name, "not a label of Traefik 2 or 3. Write routers, middlewares and services"
                )
            else:
                self._sort(owner, parts[2], parts[3], ".".join(name.split(".")[4:]), value)
        if not self._refused[owner] and not any(one.owner == owner for one in self._routers.values()):
            self._refuse(
                owner, "traefik.enable", "no router has a rule, and the default rule is unknown. Add one"
            )
        if has_routes(labels):
            self._differ(owner, HTTP, "the service already has routes of the front door. Compare them")

    def _sort(self, owner: str, kind: str, name: str, option: str, value: str) -> None:
        prefix = f"{_HTTP}{kind}.{name}"
        if kind == "middlewares":
            section = self._middlewares.setdefault(name, _Section(owner=owner, prefix=prefix))
        else:
            sections = self._routers if kind == "routers" else self._services
            section = sections.setdefault((owner, name), _Section(owner=owner, prefix=prefix))
        # Names of headers keep their case.
        words = option.split(".")
        keeps = kind == "middlewares" and len(words) == 3 and words[1].lower().startswith("custom")
        key = f"{words[0].lower()}.{words[1].lower()}.{words[2]}" if keeps else option.lower()
        if section.options.setdefault(key, value) != value:
            self._refuse(
                owner, f"{prefix}.{option}", f"service {section.owner} has this label with another value"
            )

    # -- routers -----------------------------------------------------------------------------------------------------

    def _router(self, section: _Section) -> _Router | None:
        """Return the router of a section, or None after refusing it."""
        name, rest = section.prefix.rpartition(".")[2], section.options
        rule, owner = rest.pop("rule", ""), section.owner
        label = section.label("rule")
        tls = [option for option in rest if option == "tls" or option.startswith("tls.")]
        entries = listed(rest.pop("entrypoints", ""))
        is_secure = any(rest[one].lower() != "false" for one in tls) or bool(_SECURE_ENTRIES & set(entries))
        for option in ("tls", "tls.certresolver", "rulesyntax"):
            rest.pop(option, None)
        priority, middlewares = rest.pop("priority", "0"), listed(rest.pop("middlewares", ""))
        target = rest.pop("service", "")
        for option in rest:
            self._refuse(owner, section.label(option), _reason(option, _ROUTER_OPTIONS))
        try:
            addresses = addresses_of(rule)
        except ValueError as error:
            self._refuse(owner, label, str(error) if rule else "the router has no rule. Add one")
            return None
        known = _PLAIN_ENTRIES | _SECURE_ENTRIES
        if unknown := [one for one in entries if one not in known]:
            reason = f"the port of {', '.join(unknown)} is unknown. The front door has web (80) and websecure (443)"
            self._refuse(owner, section.label("entrypoints"), reason)
            if not known & set(entries):
                self._refuse(owner, label, "no entry point of this router can be converted")
                return None
        effects = self._effects(owner, section, middlewares, addresses)
        found = self._target(section, target) if effects is not None else None
        if effects is None or found is None:
            return None
        for one in addresses:
            if one.path:
                self._differ(
                    owner, label, f"{one}x is not included, unlike in Traefik. Paths below {one} are"
                )
        options = {**found[1], **effects.options}
        if effects.redirect:
            options["redirect"] = effects.redirect
        if effects.redirect == "https" and is_secure:
            del options["redirect"]
        return _Router(
            name=name,
            owner=found[0],
            addresses=addresses,
            priority=self._priority(section, priority) or len(rule),
            is_secure=is_secure,
            redirects=effects.redirect == "https",
            options=options,
        )

    def _priority(self, section: _Section, text: str) -> int:
        if re.fullmatch(r"-?[0-9]{1,18}", text, re.ASCII) is None:
            self._refuse(section.owner, section.label("priority"), "not a number")
            return 0
        return int(text)

    def _effects(
        self, owner: str, section: _Section, names: Sequence[str], addresses: Sequence[RuleAddress]
    ) -> MiddlewareEffects | None:
        """Return what the middlewares of a router do, or None after refusing the router."""
        made, label = MiddlewareEffects(), section.label("middlewares")
        for name in self._chained(names):
            known = self._middlewares.get(name.partition("@")[0])
            if known is None or name.partition("@")[2] not in ("", "docker", "swarm"):
                self._refuse(
                    owner, label, f"{name} is not in the labels. Set its options on the route by hand"
                )
                return None
            known.is_used = True
            found = effects_of(known.options, addresses)
            for option, reason in found.refused.items():
                self._refuse(owner, known.label(option), reason)
            for option, text in found.differences.items():
                self._differ(owner, known.label(option), text)
            if found.is_blocking:
                self._refuse(owner, section.label("rule"), f"the route would lack the middleware {name}")
                return None
            twice = {one for one in _LIMITS if made.options.get(one) and one in found.options}
            twice = {one for one in twice if made.options[one] != found.options[one]}
            if "allow" in twice:
                reason = f"a route has one list of networks. Join that of {name} with the one before"
                self._refuse(owner, label, reason)
                return None
            for option in sorted(twice):
                self._differ(owner, label, f"only the {option} of {name} applies, and not the one before")
            made = made.followed_by(found)
        return made

    def _chained(self, names: Sequence[str]) -> Iterator[str]:
        """Yield the middlewares, with the members of a chain in its place.  A chain in itself has no members."""
        pending, seen = [*reversed(names)], set[str]()
        while pending:
            name = pending.pop()
            known = self._middlewares.get(name.partition("@")[0])
            members = known.options.get("chain.middlewares") if known is not None else None
            if members is None:
                yield name
            elif name not in seen:
                assert known is not None
                known.is_used = True
                seen.add(name)
                pending += reversed(listed(members))

    # -- services ----------------------------------------------------------------------------------------------------

    def _target(self, section: _Section, target: str) -> tuple[str, dict[str, str]] | None:
        """Return the service that a router leads to with its options, or None after refusing the router."""
        name, _, provider = target.lower().partition("@")
        own = [key for key in self._services if key[0] == section.owner]
        if not name and len(own) > 1:
            reason = "the labels have several services. Choose one with the router's option service"
            self._refuse(section.owner, section.label("rule"), reason)
            return None
        if name:
            own = [key for key in own if key[1] == name] or [key for key in self._services if key[1] == name]
            if len(own) != 1 or provider not in ("", "docker", "swarm"):
                reason = (
                    f"{target} is not a service in the labels, and a route leads to the service that has it"
                )
                self._refuse(section.owner, section.label("service"), reason)
                return None
        known = self._services[own[0]] if own else _Section(owner=section.owner, prefix="")
        known.is_used = True
        made = dict(self._balancer(known))
        if "port" not in made:
            text = f"the front door uses port 80. Set another one with {HTTP}.port"
            self._differ(section.owner, section.label("rule"), text)
        return known.owner, made

    def _balancer(self, section: _Section) -> Iterator[tuple[str, str]]:
        """Yield the options that a service sets."""
        for option, value in section.options.items():
            short = option.removeprefix("loadbalancer.")
            if short == "server.port":
                yield "port", value
            elif short == "server.scheme" and value.lower() == "h2c":
                yield "protocol", "h2c"
            elif short == "sticky.cookie" and value.lower() != "false":
                yield "sticky", "true"
            elif value.lower() not in _AS_IN_SKEP.get(short, set()):
                self._refuse(section.owner, section.label(option), _reason(short, _BALANCER_OPTIONS))
            if short.startswith("sticky.cookie."):
                yield "sticky", "true"

    # -- routers of the same requests --------------------------------------------------------------------------------

    def _without_twins(self, routers: Sequence[_Router]) -> list[_Router]:
        """Return the routers, each address once.

        A host often has a router for HTTPS, and another router to redirect to it.  One route does both.
        """
        taken: dict[RuleAddress, _Router] = {}
        for one in sorted(routers, key=lambda one: (not one.is_secure, -one.priority, one.owner, one.name)):
            for address in one.addresses:
                first = taken.setdefault(address, one)
                if first is one:
                    continue
                if first.is_secure == one.is_secure:
                    reason = f"router {first.name} of {first.owner} has {address}, with the priority {first.priority}"
                    self._refuse(one.owner, one.rule_label, reason)
                elif not one.redirects:
                    text = f"{address} redirects to HTTPS as soon as the host has a certificate"
                    self._differ(one.owner, one.rule_label, text)
        made = []
        for one in routers:
            addresses = tuple(address for address in one.addresses if taken[address] is one)
            plain = {} if one.is_secure or one.redirects else {"tls": "off"}
            options = {**one.options, **plain}
            made.append(msgspec.structs.replace(one, addresses=addresses, options=options))
        return made

    def _compare_priorities(self, routers: Sequence[_Router]) -> None:
        """Note each route that wins in the front door, and loses in Traefik.

        In the front door, an exact host wins over a wildcard, and then the longest path wins.
        """
        by_host: dict[str, list[tuple[RuleAddress, _Router]]] = {}
        for one in routers:
            for address in one.addresses:
                by_host.setdefault(address.host, []).append((address, one))
        for host, exact in by_host.items():
            wildcard = f"*.{host.partition('.')[2]}"
            others = by_host.get(wildcard, []) if wildcard != host else []
            pairs = [*combinations(exact, 2), *((left, right) for left in others for right in exact)]
            for left, right in pairs:
                if left[0].host == right[0].host:
                    left, right = sorted((left, right), key=lambda pair: len(pair[0].path))
                self._compare(*left, *right)

    def _compare(self, low: RuleAddress, loses: _Router, high: RuleAddress, wins: _Router) -> None:
        overlap = f"{high.path}/".startswith(f"{low.path}/") or f"{low.path}/".startswith(f"{high.path}/")
        if (
            overlap
            and loses is not wins
            and loses.is_secure == wins.is_secure
            and loses.priority >= wins.priority
        ):
            text = f"{high} wins over {low}, which router {loses.name} of {loses.owner} gets in Traefik by its priority"
            self._differ(wins.owner, wins.rule_label, text)

    # -- labels ------------------------------------------------------------------------------------------------------

    def _compare_stacks(self, labels: Mapping[str, Mapping[str, str]]) -> None:
        """Note each host that services of several stacks want, which Traefik allows."""
        claimants = [
            Claimant(
                id=ServiceId(name),
                name=name,
                stack=self._labels[name].get(STACK_LABEL, ""),
                routes=parsed_routes(labels[name]),
            )
            for name in self._labels
        ]
        for name, refused in settled(claimants).refused.items():
            for refusal in refused.values():
                text = f"{refusal.reason}. Set skep.http.share=true on the service that gets the host first"
                self._differ(name, HTTP, text)

    def _route_labels(self, owner: str, routers: Sequence[_Router]) -> dict[str, str]:
        """Return the labels of a service's routes.  Routes with the same options share a label."""
        groups: dict[tuple[tuple[str, str], ...], list[_Router]] = {}
        for one in routers:
            if one.addresses:
                groups.setdefault(tuple(sorted(one.options.items())), []).append(one)
        made: dict[str, str] = {}
        for options, members in groups.items():
            prefix = HTTP if len(groups) == 1 else _free_name(members[0].name, made)
            labels = {prefix: ",".join(str(address) for one in members for address in one.addresses)}
            labels |= {f"{prefix}.{option}": value for option, value in options}
            try:
                parsed_routes(labels)
            except InvalidArgument as error:
                for one in members:
                    self._refuse(one.owner, one.rule_label, str(error))
                continue
            made |= labels
        return dict(sorted(made.items()))


def _reason(option: str, reasons: Mapping[str, str]) -> str:
    """Return the reason for the longest name that ``option`` begins with."""
    found = [name for name in reasons if option == name or option.startswith((f"{name}.", f"{name}["))]
    return reasons[max(found, key=len)] if found else "unknown option"


def _free_name(router: str, made: Mapping[str, str]) -> str:
    """Return a label for the routes of a router that is not in use."""
    name = re.sub(r"[^a-z0-9]+", "-", router.lower(), flags=re.ASCII).strip("-")[:24] or "route"
    if name in (*OPTIONS, *HEADER_OPTIONS):
        name = f"route-{name}"
    number, label = 1, f"{HTTP}.{name}"
    while label in made:
        number += 1
        label = f"{HTTP}.{name}-{number}"
    return label
