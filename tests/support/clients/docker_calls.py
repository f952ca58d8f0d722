"""Calls of Docker's Python client that have no method of their own."""

from typing import Any

import requests
from docker import APIClient


def raw_post(api: APIClient, path: str, *arguments: str, **given: Any) -> requests.Response:
    """Post JSON to a path, and return the response as it is."""
    response: requests.Response = api._post_json(api._url(path, *arguments), **given)
    return response


def raw_get(api: APIClient, path: str, *arguments: str) -> requests.Response:
    """Get a path, and return the response as it is."""
    response: requests.Response = api._get(api._url(path, *arguments))
    return response
