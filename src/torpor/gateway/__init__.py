"""Invocations: route a request, wait for an instance, proxy it, scale to and from zero."""

from torpor.gateway.gateway import Gateway
from torpor.gateway.stats import FunctionStats, GatewayStats, Histogram, WakeRecord

__all__ = ["FunctionStats", "Gateway", "GatewayStats", "Histogram", "WakeRecord"]
