"""How a deployment's wanted revision takes over."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("deployments", sa.Column("canary", sa.Text(), nullable=True))


def downgrade() -> None:
    op.drop_column("deployments", "canary")
