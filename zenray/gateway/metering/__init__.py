"""Exact usage: counted where it cannot be lost, billed once, and covered by credit before an engine is asked."""

from zenray.gateway.metering.charge import Charge
from zenray.gateway.metering.leases import LeaseBook
from zenray.gateway.metering.meter import Meter
from zenray.gateway.metering.replay import replay
from zenray.gateway.metering.shipper import Shipper
from zenray.gateway.metering.wal import MeterFull

__all__ = ["Charge", "LeaseBook", "Meter", "MeterFull", "Shipper", "replay"]
