"""The nodes of a cluster: which are there, which are being drained or have gone, and how many workers they have room
for."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

from orchestrator.pools.share import Share

_LOG = logging.getLogger("orchardist.pool")


class Nodes:
    """What the last look at the cluster has shown.

    Args:
        ray: the module, connected to the cluster.
        share: what each worker takes; its `gpus` is a number.
    """

    def __init__(self, ray: Any, share: Share) -> None:
        self._ray = ray
        self._share = share
        self.there: frozenset[str] = frozenset()
        self.draining: frozenset[str] = frozenset()
        """Those of them that are about to be taken away: they get no new stages."""
        self.gone: frozenset[str] = frozenset()
        """Homes of workers that are there no more; Ray says nothing of idle workers there until one is to work."""
        self.room = 0
        """How many workers there is room for, on all nodes that stay."""
        self.shares = math.inf
        """How many shares of a GPU there are, where workers take less than one."""
        self.looked_at = -math.inf
        self.lost_at = -math.inf
        """When a node was last seen to be missing."""

    def look(self, now: float, homes: Iterable[str]) -> None:
        """Look at the cluster; `homes` are the nodes that have workers."""
        self.looked_at = now
        listed: list[dict[str, Any]] = self._ray.nodes()
        nodes = {node["NodeID"]: node for node in listed if node["Alive"]}
        draining = frozenset(self._ray._private.state.state.get_draining_nodes()) & nodes.keys()
        for name in draining - self.draining:
            host = nodes[name]["NodeManagerHostname"]
            _LOG.warning("the node %s is being drained: it gets no new stages", host)
        lost = self.there - nodes.keys()
        if lost:
            self.lost_at = now
        dead = {node["NodeID"] for node in listed} - nodes.keys()
        self.gone = (self.gone | lost | dead) & frozenset(homes)
        self.draining, self.there = draining, frozenset(nodes)
        staying = [(node["Resources"], node["Labels"]) for name, node in nodes.items() if name not in draining]
        self.room = sum(self._share.room(resources, labels) for resources, labels in staying)
        self.shares = sum((self._share.gpu_shares(resources) for resources, _ in staying), start=0.0)
