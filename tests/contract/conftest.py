"""Servers that contract tests share."""

from tests.cluster.ray_session import ray_session as ray_session
