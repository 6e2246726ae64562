"""What one gateway is told when it starts."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from zenray.spec.errors import InvalidDocument
from zenray.spec.platform import GatewaySettings


class GatewayConfig(GatewaySettings):
    """The file given to `python -m zenray.gateway`. Process number i is known to control as `{gateway_id}-{i}`."""

    control_url: str = Field(pattern=r"^https?://", description="Without a trailing slash.")
    edge_token_file: Path = Field(description="Holds the token of control's edge routes.")
    state_dir: Path = Field(description="Snapshot and usage log; survives restarts. Each process has a folder in it.")
    gateway_id: str = Field(
        "gateway", pattern=r"^[a-z0-9][a-z0-9.-]{0,40}$", description="Unique among the gateways of one control."
    )
    key_prefix: str = Field("sk-zen-", pattern=r"^[a-z0-9-]{2,20}$")
    ping_interval_s: float = Field(5, gt=0, description="Between keep-alive comments on a stream that waits.")
    upstream_silence_s: float = Field(600, gt=0, description="A replica that sends nothing for so long has failed.")
    lease_wait_s: float = Field(1, gt=0, description="A request without credit waits so long for control.")

    def edge_token(self) -> str:
        """The token. Raises InvalidDocument when the file is missing or empty."""
        try:
            token = self.edge_token_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise InvalidDocument(f"edge_token_file {self.edge_token_file} cannot be read: {error.strerror}.") from None
        if not token:
            raise InvalidDocument(f"edge_token_file {self.edge_token_file} is empty.")
        return token

    def process_id(self, index: int) -> str:
        return f"{self.gateway_id}-{index}"

    def process_dir(self, index: int) -> Path:
        return self.state_dir / self.process_id(index)

    def folders_of_others(self) -> list[tuple[str, Path]]:
        """Id and folder of each process that an earlier start of this gateway had, and this one has not."""
        found = {}
        for folder in self.state_dir.glob(f"{self.gateway_id}-*"):
            index = folder.name.removeprefix(f"{self.gateway_id}-")
            if index.isdecimal() and int(index) >= self.processes:
                found[int(index)] = folder
        return [(self.process_id(index), folder) for index, folder in sorted(found.items())]
