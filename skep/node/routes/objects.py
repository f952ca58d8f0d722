"""Routes of a node's networks, containers, images and volumes, merged with the Docker Engine's and the cluster's."""

from aiohttp import web

from skep.aio.clock import Clock
from skep.engine.api.containers import create_routes
from skep.engine.api.routes import engine_routes
from skep.engine.engine import Engine
from skep.node.docker.docker_engine import DockerEngine, with_containers_of
from skep.node.docker.engine_images import EngineImages
from skep.node.routes.cluster_networks import ClusterNetworks
from skep.node.routes.cluster_volumes import with_cluster_volumes
from skep.node.routes.docker_objects import with_objects_of
from skep.node.routes.plain_containers import plain_container_routes


def object_routes(
    engine: Engine | None,
    docker: DockerEngine | None,
    images: EngineImages | None,
    clock: Clock,
    networks: web.RouteTableDef,
    cluster: ClusterNetworks,
) -> tuple[web.AbstractRouteDef, ...]:
    """Return the routes.

    Args:
        engine: This node's engine, or None on a node without containers.
        docker: The machine's Docker Engine, if there is one.
        images: Images shared by the two engines.
        networks: The routes of networks.
    """
    own = engine_routes(engine, clock) if engine is not None else ()
    if docker is not None and engine is not None and images is not None:
        own = with_objects_of(docker, images, engine.volumes, own)
    own = with_cluster_volumes(cluster, own)
    if docker is not None:
        plain = plain_container_routes(docker, engine, images, cluster.may_have)
        return (*networks, *with_containers_of(docker, own), *plain)
    return (*networks, *own, *(create_routes(engine) if engine is not None else ()))
