"""The family as data: sizes, variants, dimensions, prices and limits, and what they cost in memory."""

from zenray.catalog.catalog import Catalog
from zenray.catalog.entries import ModelEntry

__all__ = ["Catalog", "ModelEntry"]
