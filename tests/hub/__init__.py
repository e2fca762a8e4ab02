"""A Hub-compatible server on loopback, standard library only: what publishing and loading are tested against."""

from .server import Fault, HubServer
from .store import Repo

__all__ = ["Fault", "HubServer", "Repo"]
